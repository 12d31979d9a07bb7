"""A loss of the device's own, on what crosses the cut, so that nothing need return.

Belilovsky et al. 2020 (greedy learning, decoupled); Han et al. 2021 (split learning with local losses).

The head is a linear layer on each channel's mean: of pictures (N, C, H, W) over the places, of sequences (N, T, C) over
the time. It is trained with the device's part and kept by the device; it is no part of the model.
Needs a model that returns one tensor (N, K), and a loss of such a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgefl.config import TrainConfig
from edgefl.errors import ConfigError
from edgefl.offload.training.halves import DeviceForward
from edgefl.offload.training.parts import CLOUD, ModelParts
from edgefl.task import Task, UserCode
from edgefl.training.randomness import seeded
from edgefl.training.steps.descent import loss_of
from edgefl.trees import Array, Tree
from edgefl.trees.tensors import array_of, tensor_of

if TYPE_CHECKING:
    import torch

PREFIX = "auxiliary/"


class AuxiliaryLoss:
    """The head, plain SGD on it, and the gradients that it gives the device's part."""

    def __init__(self, task: Task, config: TrainConfig, kept: Tree | None = None) -> None:
        """`kept` is what `state` returned after the device's former training."""
        self._task, self._config, self._kept = task, config, kept or {}
        self._head: torch.nn.Linear | None = None

    def learn(self, one: DeviceForward, targets: Any) -> float:
        """Take a step of the head, and accumulate the gradients of the device's part; return the micro-batch's loss."""
        import torch

        features = torch.cat([_pooled(value) for value in _floats(one)], 1)
        head = self._head_for(features.shape[1], one.parts)
        with UserCode(self._task.name, "the auxiliary loss"):
            loss = loss_of(self._task, head(features), targets)
        (loss * one.micro.share).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for parameter in head.parameters():
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=self._config.lr)
                parameter.grad = None
        return float(loss.detach())

    def state(self) -> dict[str, Array]:
        """Return what the device keeps for its next round."""
        if self._head is None:
            return {}
        return {f"{PREFIX}{name}": array_of(one).copy() for name, one in self._head.named_parameters()}

    def _head_for(self, num_features: int, parts: ModelParts) -> torch.nn.Linear:
        import torch

        if self._head is None:
            if not parts.num_outputs:
                raise ConfigError(
                    f"task {self._task.name!r}: train.split.gradients='auxiliary' needs a model that returns one "
                    "tensor (N, K); use 'returned'"
                )
            with seeded(self._config.seed):
                self._head = torch.nn.Linear(num_features, parts.num_outputs)
            self._restore(self._head, self._kept)
        return self._head

    @staticmethod
    def _restore(head: torch.nn.Linear, kept: Mapping[str, Array]) -> None:
        import torch

        with torch.no_grad():
            for name, one in head.named_parameters():
                if f"{PREFIX}{name}" in kept:
                    one.copy_(tensor_of(kept[f"{PREFIX}{name}"].copy()))


def _floats(one: DeviceForward) -> list[torch.Tensor]:
    found = [one.known[name] for name in one.parts.parts[CLOUD].needs]
    return [value for value in found if value.is_floating_point() and value.requires_grad and value.ndim > 1]


def _pooled(value: torch.Tensor) -> torch.Tensor:
    """Return (N, C) of (N, C, H, W), (N, T, C) or (N, C)."""
    if value.ndim == 3:
        return value.mean(1)
    return value.flatten(2).mean(2) if value.ndim > 3 else value
