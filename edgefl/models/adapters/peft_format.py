"""Adapters in the form that peft loads: a folder with adapter_model.safetensors and adapter_config.json.

    model = PeftModel.from_pretrained(base, FOLDER)        # base: the model before peft wrapped it

The scaling is part of the factors, so each layer's alpha is its rank. Layers may have different ranks: `rank_pattern`.
Modules that were trained as a whole (`modules_to_save`) are in the file, too. The configuration's `revision` is the
SHA-256 of the base's tensors, in their order.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgefl.errors import ConfigError, TaskError
from edgefl.models.adapters.ranks import factors_at
from edgefl.task import Task
from edgefl.training.adapters import adapters_of
from edgefl.training.local import make_model
from edgefl.trees import Array, Tree, write_tree

if TYPE_CHECKING:
    import torch

_PREFIX = "base_model.model."
_SAVED = ".modules_to_save."


def base_digest(weights: Iterable[tuple[str, Array]]) -> str:
    """Return the SHA-256 of the weights, by name, to which adapters are added: the base that they belong to."""
    digest = hashlib.sha256()
    for name, weight in weights:
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(weight).view(np.uint8).data)
    return digest.hexdigest()


def write_adapter(task: Task, tree: Tree, folder: Path, rank: int | None = None) -> dict[str, int]:
    """Write a model's adapters into a folder; return the rank of each layer.

    Raises ConfigError for a task without adapters, TaskError for a model that peft did not wrap as a whole.
    """
    model = make_model(task)
    adapters = adapters_of(task.name, model)
    if not adapters:
        raise ConfigError(f"task {task.name!r}: its model has no trained adapters of peft; there is nothing to write")
    config = _config_of(task, model, adapters[0].name)
    tensors, ranks = dict[str, Array](), dict[str, int]()
    for one in adapters:
        pair = factors_at(tree, one.matrix, rank)
        ranks[one.path] = max(1, pair.rank)
        missing = ranks[one.path] - pair.rank  # peft has no rank 0
        tensors[f"{one.path}.lora_A.weight"] = np.pad(pair.right, ((0, missing), (0, 0)))
        tensors[f"{one.path}.lora_B.weight"] = np.pad(pair.left, ((0, 0), (0, missing)))
    tensors |= _whole_modules(tree, adapters[0].name)
    said = copy.deepcopy(config)
    said.r = said.lora_alpha = max(ranks.values())
    said.rank_pattern = {path.removeprefix(_PREFIX): one for path, one in ranks.items()}
    said.alpha_pattern = dict(said.rank_pattern)
    said.use_rslora, said.inference_mode = False, True
    said.base_model_name_or_path, said.revision = (
        said.base_model_name_or_path or task.name,
        base_digest((one.weight, tree[one.weight]) for one in adapters),
    )
    folder.mkdir(parents=True, exist_ok=True)
    said.save_pretrained(str(folder))
    with (folder / "adapter_model.safetensors").open("wb") as file:
        write_tree(tensors, file)
    return ranks


def _config_of(task: Task, model: torch.nn.Module, name: str) -> Any:
    config = getattr(model, "peft_config", {}).get(name)
    if config is None:
        raise TaskError(
            f"task {task.name!r}: only a part of its model is peft's, so peft could not load the adapters into the "
            "whole. Return get_peft_model(..) from `model`"
        )
    return config


def _whole_modules(tree: Tree, name: str) -> dict[str, Array]:
    """Return the tensors of modules that are trained as a whole, under peft's names."""
    mark = f"{_SAVED}{name}."
    return {key.replace(mark, "."): np.ascontiguousarray(tree[key]) for key in tree if mark in key}
