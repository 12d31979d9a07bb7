"""A model in parts that are trained apart: what each part needs, gives, and which tensors of the model's state it has.

A part is a function of the state (tensors by their names in the model) and of values (tensors by name): so the same
part serves many devices, each with a state of its own, and a tied weight is one tensor wherever it is read.
Invariant: the parts, one after the other, compute what the model computes; `trial.py` asserts it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from edgefl.errors import ConfigError

if TYPE_CHECKING:
    import torch

Values = dict[str, "torch.Tensor"]
INPUT = "input"  # the prefix of the inputs' leaves: input.0, input.1
DEVICE, CLOUD, LAST = 0, 1, 2  # positions of the parts


class LayerRange(Protocol):
    """Some consecutive layers of a model."""

    needs: list[str]  # values that it reads
    gives: list[str]  # values that it makes and others read
    tensors: list[str]  # names of its tensors in the model's state, each tied tensor by one name

    def run(self, state: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> Values:
        """Return `gives`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelParts:
    """A model cut once or twice, for inputs of one shape."""

    parts: Sequence[LayerRange]  # the device's, the cloud's, and the device's last one if there is one
    outputs: Callable[[Mapping[str, torch.Tensor]], Any] = field(repr=False)  # values -> what the model returns
    num_outputs: int = 0  # K, if the model returns one tensor (N, K); else 0

    @property
    def has_last(self) -> bool:
        """Whether the last layers are on the device."""
        return len(self.parts) > LAST

    def of_device(self) -> list[str]:
        """Return the names of the device's tensors."""
        parts = [self.parts[DEVICE], *self.parts[LAST:]]
        return list(dict.fromkeys(name for part in parts for name in part.tensors))

    def of_cloud(self) -> list[str]:
        """Return the names of the cloud's tensors."""
        return list(self.parts[CLOUD].tensors)


def refuse_shared(parts: ModelParts, trained: frozenset[str], model: str) -> None:
    """Raise ConfigError if a trained tensor is on both sides: each side would train a copy of its own."""
    both = sorted(set(parts.of_device()) & set(parts.of_cloud()) & trained)
    if both:
        raise ConfigError(
            f"{model}: {', '.join(both):.500} would be trained on the device and in the cloud, such as an embedding "
            "that is tied to the head. Set train.split.last_cut, so that both ends are on the device, or freeze it"
        )


def refuse_batch_norm(model: torch.nn.Module, micro_batches: int) -> None:
    """Raise ConfigError if micro-batches would change what batch norm computes."""
    from edgefl.training.local import has_batch_norm

    if micro_batches > 1 and has_batch_norm(model):
        raise ConfigError(
            f"train.split.micro_batches={micro_batches}: {type(model).__name__} has batch norm, whose statistics would "
            "be those of a micro-batch, not of the batch. Set micro_batches=1, or use group norm"
        )
