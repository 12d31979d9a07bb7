"""Whether a job averages a task's adapters exactly; if not, it is refused before it starts, with a way out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from edgefl.aggregation import rule_kind
from edgefl.aggregation.schedules import of_round
from edgefl.config import JobConfig
from edgefl.errors import ConfigError, TaskError
from edgefl.task import Task
from edgefl.training.adapters.layers import Adapter, adapters_of, refuse_begun
from edgefl.training.adapters.settings import training_fault
from edgefl.training.local import make_model

if TYPE_CHECKING:
    import torch

_FACTOR = re.compile(r"(?P<layer>.*)\.lora_(?P<side>[AB])(\..*)?")


def refuse_inexact(task: Task, config: JobConfig) -> None:
    """Raise ConfigError for settings by which a task's adapters would not be averaged exactly, TaskError for adapters.

    A task without a model, or without adapters, is left alone.
    """
    if task.model is None:
        return
    model = make_model(task)
    adapters = adapters_of(task.name, model)
    refuse_begun(task.name, adapters)
    _refuse_unknown_factors(task.name, model, adapters)
    if adapters and (fault := _fault(config)):
        raise ConfigError(f"task {task.name!r} trains LoRA adapters ({adapters[0].path} ..), and {fault}")


def _fault(config: JobConfig) -> str:
    rule = config.aggregation.rule
    if not rule_kind(rule).merges:
        return (
            f"aggregation.rule={rule} chooses among updates or their numbers, so its result is not the mean of the "
            "adapters' products. Use aggregation.rule=mean, or freeze the adapters' A (FFA-LoRA): then B is an "
            "ordinary parameter"
        )
    return training_fault(of_round(config, 1))


def _refuse_unknown_factors(task: str, model: torch.nn.Module, adapters: Iterable[Adapter]) -> None:
    """Raise TaskError for trained factors that are not peft's: each would be averaged by itself."""
    known = {name for one in adapters for name in one.factor_names}
    sides: dict[str, set[str]] = {}
    for name, parameter in model.named_parameters():
        if (match := _FACTOR.fullmatch(name)) and parameter.requires_grad and name not in known:
            sides.setdefault(match["layer"], set()).add(match["side"])
    if both := sorted(layer for layer, found in sides.items() if len(found) == 2):
        raise TaskError(
            f"task {task!r}: layer {both[0]!r} trains lora_A and lora_B, which peft did not make, so each would be "
            "averaged by itself, and the product of the means is not the mean of the products. Make the adapters with "
            "peft, or freeze lora_A (requires_grad_(False)): then the mean of lora_B is exact"
        )
