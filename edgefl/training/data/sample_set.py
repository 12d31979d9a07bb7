"""Sets of samples: what is trained on and evaluated, batch by batch.

`Samples` are in memory, and so is each batch. `edgefl.training.data.dataset` has those that are read as needed.
Invariant: the batches of one order are equal, bit for bit, wherever the samples are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from edgefl.training.structures import Structure, leaves, num_rows, rows

if TYPE_CHECKING:
    import torch


class SampleSet(Protocol):
    """Inputs and targets of a client, or of a held-out set. There is at least one sample."""

    @property
    def device(self) -> torch.device:
        """The device of positions, for `batches` and `chosen`."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def batches(self, order: Iterable[torch.Tensor], seed: int) -> Iterator[Samples]:
        """Yield a batch for each tensor of positions, (B,); `seed` is for random numbers in the user's reading."""

    def chunks(self, size: int) -> Iterator[Samples]:
        """Yield the samples in order, `size` at a time."""

    def chosen(self, which: torch.Tensor | slice) -> SampleSet:
        """Return the samples at these positions, an integer tensor on `device`, or of this slice."""

    def first(self, size: int) -> Samples:
        """Return the first samples, `size` or all, in memory."""


@dataclass(frozen=True, slots=True)
class Samples:
    """A set of samples in memory, on the device that computes; also one batch of any set."""

    inputs: Structure  # of tensors, (N, ...) each
    targets: Structure  # of tensors, (N, ...) each

    def __len__(self) -> int:
        if isinstance(self.inputs, (tuple, dict)):
            return num_rows(leaves(self.inputs)[0])
        return len(self.inputs)  # one tensor: asked for often

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        device: torch.device = leaves(self.inputs)[0].device
        return device

    def batches(self, order: Iterable[torch.Tensor], seed: int) -> Iterator[Samples]:  # noqa: ARG002 - nothing is read
        """Yield a batch for each tensor of positions."""
        import torch

        inputs, targets = self.inputs, self.targets
        if isinstance(inputs, torch.Tensor) and isinstance(targets, torch.Tensor):  # most tasks: no detours
            for which in order:
                yield Samples(inputs[which], targets[which])
        else:
            for which in order:
                yield self.chosen(which)

    def chunks(self, size: int) -> Iterator[Samples]:
        """Yield the samples in order, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.chosen(slice(start, start + size))

    def chosen(self, which: torch.Tensor | slice) -> Samples:
        """Return the samples at these positions, or of this slice."""
        return Samples(rows(self.inputs, which), rows(self.targets, which))

    def first(self, size: int) -> Samples:
        """Return the first samples, `size` or all."""
        return self.chosen(slice(size))


def computing_device() -> torch.device:
    """Return the device for computing: the GPU if there is one."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
