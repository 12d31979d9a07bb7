"""A whole language model in memory: one that transformers loads, from its folder or a GGUF file."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgefl.errors import ConfigError, MissingExtra
from edgefl.offload.generation.stage_info import TextFacts
from edgefl.trees import Array, Factors
from edgefl.trees.tensors import array_of

if TYPE_CHECKING:
    import torch

ALLOWED = 1e-4  # difference of logits that should be the same: float32, in another order of additions
TRIED_TOKENS = 12
_NAME = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageModel:
    """A whole decoder in memory."""

    name: str
    module: torch.nn.Module  # of transformers, in float32
    tokenizer: str  # tokenizer.json
    text: TextFacts
    changes: Mapping[str, Factors] = field(default_factory=dict)  # by weight: what was added to a base's


def open_language_model(path: Path, name: str = "") -> LanguageModel:
    """Load a folder of transformers or a .gguf file; raises ConfigError for anything else, MissingExtra."""
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging as transformers_logging
    except ImportError as cause:
        raise MissingExtra("splitting a language model", "offload") from cause
    quiet: Any = transformers_logging
    quiet.disable_progress_bar()  # a reader of a log does not want its hundreds of lines
    is_file = path.suffix == ".gguf" and path.is_file()
    if not is_file and not (path / "config.json").is_file():
        raise ConfigError(
            f"{path} is no language model: expected a folder of transformers (config.json, *.safetensors, "
            "tokenizer.json), or a .gguf file"
        )
    folder, options = (path.parent, {"gguf_file": path.name}) if is_file else (path, {})
    try:
        module: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, **options
        )
        module.eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, struct.error) as cause:
        raise ConfigError(f"{path} cannot be loaded by transformers: {cause}") from cause
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(f"{path} has a tokenizer without a tokenizer.json, which devices need; convert it first")
    ends = getattr(module.generation_config, "eos_token_id", None)
    return LanguageModel(
        name=_NAME.sub("-", name or path.stem.partition(".Q")[0]).strip("-.").lower(),
        module=module,
        tokenizer=backend.to_str(),
        text=TextFacts(
            chat_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else "",
            bos_token=tokenizer.bos_token or "",
            eos_token=tokenizer.eos_token or "",
            end_tokens=tuple(ends if isinstance(ends, list) else [] if ends is None else [ends]),
        ),
    )


def logits_of(module: Any, tokens: Array) -> Array:
    """Return a whole model's logits (T, V) for tokens (T,)."""
    import torch

    with torch.no_grad():
        return array_of(module(input_ids=torch.from_numpy(tokens)[None], use_cache=False).logits[0])


def difference(wanted: Array, seen: Array) -> float:
    """Return the largest difference of logits, as a share of the largest logit; NaN if there is one."""
    return float(np.abs(wanted - seen).max() / max(1e-12, np.abs(wanted).max()))
