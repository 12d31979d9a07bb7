"""SmolLM2-135M-Instruct as stages, for benchmarks and tests: downloaded and split once, kept in the user's cache."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from edgefl.errors import EdgeflError
from edgefl.offload.generation.stage_info import FORMAT, read_stage

EXAMPLE = Path(__file__).parents[1] / "examples" / "chat" / "get_model.py"
CUT = 6
PROMPT = "Write a long story about a fox and a lighthouse."


class NoModel(Exception):
    """The model cannot be downloaded."""


def model_file() -> Path:
    """Return the GGUF file; raises NoModel if no index has it."""
    source = _example()
    try:
        path: Path = source.fetch(source.cache_folder())
    except SystemExit as cause:
        raise NoModel(str(cause)) from cause
    return path


def stage_folders() -> Path:
    """Return the folder with `head`, `tail` (cut behind six blocks) and `whole`; raises NoModel."""
    folder: Path = _example().cache_folder() / f"smollm2-stages-{FORMAT}-{CUT}"
    try:
        head, tail, _ = (read_stage(folder / one) for one in ("head", "tail", "whole"))
    except EdgeflError:
        from edgefl.offload.generation.language_model import open_language_model
        from edgefl.offload.generation.splitting import split_language_model

        model = open_language_model(model_file(), "smollm2")
        split_language_model(model, None, folder)
        head, tail = split_language_model(model, CUT, folder)
    if head.tail_digest != tail.digest:
        raise NoModel(f"{folder} has a head and a tail of different splits; delete it")
    return folder


def _example() -> Any:
    spec = importlib.util.spec_from_file_location("chat_get_model", EXAMPLE)
    if spec is None or spec.loader is None:
        raise NoModel(f"there is no {EXAMPLE}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
