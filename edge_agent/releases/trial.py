"""Tries a release in a separate process, before it may replace the one that serves.

    python -P -m edge_agent.releases.trial --name N --version V --path FILE --sample FILE ... --memory-mb N --say N

It loads the model and runs it on its sample, with a deadline and a memory limit. A crash in a native kernel, a load
that never ends, or a model that needs too much memory ends the trial only.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from edge_agent.sessions import load
from edgefl.errors import EdgeflError, ProtocolError
from edgefl.process.children import Child, die_with_parent, limit_own_memory

MAX_REASON_BYTES = 4000
_NICENESS = 5  # the serving process has priority


async def try_model(
    name: str, version: int, files: Sequence[tuple[Path, Path | None]], *, memory_mb: int, within_s: float
) -> None:
    """Load the files of a model in a separate process and run each on its sample; raises ProtocolError.

    Cancelling kills the process.
    """
    arguments = ["--name", name, "--version", str(version), "--memory-mb", str(memory_mb)]
    for path, sample in files:
        arguments += ["--path", str(path), "--sample", "" if sample is None else str(sample)]
    await _tried("edge_agent.releases.trial", arguments, f"model {name} version {version}", within_s)


async def try_stage(name: str, version: int, folder: Path, *, tail: str, memory_mb: int, within_s: float) -> None:
    """Load the stage of a language model in a separate process and run it on a few tokens; raises ProtocolError."""
    arguments = ["--folder", str(folder), "--tail", tail, "--memory-mb", str(memory_mb)]
    await _tried("edge_agent.generation.stage_trial", arguments, f"model {name} version {version}", within_s)


async def _tried(module: str, arguments: Sequence[str], what: str, within_s: float) -> None:
    ours, theirs = os.pipe()
    try:
        child = Child(module, *arguments, "--say", str(theirs), descriptors=[theirs])
    finally:
        os.close(theirs)
    try:
        async with asyncio.timeout(within_s):
            await child.ended.wait()
        reason = os.read(ours, MAX_REASON_BYTES).decode(errors="replace")
    except TimeoutError as cause:
        raise ProtocolError(f"{what} was not loaded and run within {within_s:g} s") from cause
    finally:
        os.close(ours)
        await asyncio.shield(asyncio.create_task(child.kill()))
    if child.end != "ended with exit status 0":
        raise ProtocolError(reason or f"the process that tried {what} {child.end}")


def main() -> None:
    """Load the model, run it, report an error, and exit."""
    parser = argparse.ArgumentParser(prog="edgefl-trial", description="Loads a model and runs it.")
    parser.add_argument("--name", required=True)
    parser.add_argument("--path", type=Path, action="append", required=True)
    parser.add_argument("--sample", action="append", required=True, help="of the path before it; empty = none")
    for option in ("--version", "--memory-mb", "--say"):
        parser.add_argument(option, type=int, required=True)
    arguments = parser.parse_args()

    def load_all() -> None:
        loaded = []  # all at once, as they will be served
        for path, sample in zip(arguments.path, arguments.sample, strict=True):
            loaded.append(load(arguments.name, arguments.version, path, Path(sample) if sample else None))

    run_trial(load_all, arguments.memory_mb, arguments.say)


def run_trial(attempt: Callable[[], None], memory_mb: int, say: int, check: Callable[[], object] = int) -> NoReturn:
    """Run a trial in this process, and exit; an error is written to the descriptor `say`. Predictions go first.

    `check` comes before the limit: where that is small, there would be no memory to say what is needed.
    """
    die_with_parent()
    os.setpriority(os.PRIO_PROCESS, 0, max(_NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))
    try:
        check()
        limit_own_memory(memory_mb)
        attempt()
    except (EdgeflError, OSError, MemoryError) as error:
        reason = str(error) or "there is too little memory to load the model"
        os.write(say, reason.encode()[:MAX_REASON_BYTES])
        os._exit(1)
    os._exit(0)  # skips the slow teardown of the session


if __name__ == "__main__":
    main()
