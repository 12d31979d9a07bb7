"""Tries a release in a separate process, before it may replace the one that serves.

    python -P -m edge_agent.releases.trial --name N --version V --path FILE --sample FILE ... --memory-mb N --say N

It loads the model and runs it on its sample, with a deadline and a memory limit. A crash in a native kernel, a load
that never ends, or a model that needs too much memory ends the trial only.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Sequence
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
    die_with_parent()
    limit_own_memory(arguments.memory_mb)
    yield_to_serving()
    try:
        loaded = []  # all at once, as they will be served
        for path, sample in zip(arguments.path, arguments.sample, strict=True):
            loaded.append(load(arguments.name, arguments.version, path, Path(sample) if sample else None))
    except (EdgeflError, OSError) as error:
        say_why(arguments.say, error)
    os._exit(0)  # skips the slow teardown of the session


def yield_to_serving() -> None:
    """Lower this process's priority: predictions go first."""
    os.setpriority(os.PRIO_PROCESS, 0, max(_NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))


def say_why(descriptor: int, error: BaseException) -> NoReturn:
    """Tell the agent why the trial failed, and exit."""
    os.write(descriptor, str(error).encode()[:MAX_REASON_BYTES])
    os._exit(1)


if __name__ == "__main__":
    main()
