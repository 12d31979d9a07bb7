"""Tries the stage of a language model in a separate process, before texts may be generated with it.

    python -P -m edge_agent.generation.stage_trial --folder DIR --tail HOST:PORT --memory-mb N --say N

It loads the stage and its tokenizer, and runs a few tokens, with a deadline and a memory limit. The tail is not asked:
it may be there later.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import numpy as np

from edge_agent.generation.memory import check_memory
from edge_agent.generation.text import TextCodec
from edge_agent.releases.trial import run_trial
from edgefl.errors import ProtocolError
from edgefl.offload.generation.blocks import Rows, numpy_engine
from edgefl.offload.generation.generate import load_part
from edgefl.offload.generation.stage_info import check_first, read_stage

TOKENS = 4


def check_folder(folder: Path, tail: str, memory_mb: int) -> None:
    """Raise EdgeflError unless the stage in a folder is for devices and fits into so much memory (0 = no limit)."""
    info = read_stage(folder)
    check_first(info, tail, "publish it with --tail")
    check_memory(info, memory_mb)


def run_stage(folder: Path) -> None:
    """Raise EdgeflError unless the stage in a folder can generate here."""
    info = read_stage(folder)
    TextCodec(folder, info)
    part = load_part(folder, numpy_engine())
    tokens = [one % info.spec.vocabulary for one in range(TOKENS)]
    hidden = part.engine.numpy(part.run(part.embed(tokens), [Rows(part.new_cache(), TOKENS)]))
    if not np.isfinite(hidden).all():
        raise ProtocolError(f"{info.what} computes NaN or infinity; split the model again")


def main() -> None:
    """Try the stage, report an error, and exit."""
    parser = argparse.ArgumentParser(prog="edgefl-stage-trial", description="Loads a language model's stage, runs it.")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--tail", default="", help="HOST:PORT; empty = the folder has the whole model")
    for option in ("--memory-mb", "--say"):
        parser.add_argument(option, type=int, required=True)
    arguments = parser.parse_args()
    folder, memory_mb = arguments.folder, arguments.memory_mb
    check = functools.partial(check_folder, folder, arguments.tail, memory_mb)
    run_trial(functools.partial(run_stage, folder), memory_mb, arguments.say, check)


if __name__ == "__main__":
    main()
