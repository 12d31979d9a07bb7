"""A batch as a list of tensors: recorded steps are functions of tensors, a task's are of structures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgefl.training.structures import Structure, flattened, restored


@dataclass(frozen=True, slots=True)
class Batch:
    """The leaves of inputs and targets, those of the inputs first."""

    tensors: Sequence[Any]
    form: Any  # of the pair of inputs and targets; None for one tensor each

    @staticmethod
    def of(inputs: Structure, targets: Structure) -> Batch:
        """Return the batch of these inputs and targets."""
        import torch

        if isinstance(inputs, torch.Tensor) and isinstance(targets, torch.Tensor):
            return Batch((inputs, targets), None)
        tensors, form = flattened((inputs, targets))
        return Batch(tensors, form)

    def structures(self, tensors: Sequence[Any]) -> tuple[Structure, Structure]:
        """Return inputs and targets of this batch's form, made of these tensors."""
        inputs, targets = tensors if self.form is None else restored(tensors, self.form)
        return inputs, targets

    def is_tensors(self) -> bool:
        """Whether all leaves are tensors."""
        import torch

        return all(isinstance(one, torch.Tensor) for one in self.tensors)

    def key(self) -> object:
        """Return what batches have in common that one recording can compute."""
        if self.form is None:
            inputs, targets = self.tensors
            return (inputs.shape, inputs.stride(), inputs.dtype, targets.shape, targets.dtype)
        return (self.form, *((one.shape, one.stride(), one.dtype) for one in self.tensors if hasattr(one, "stride")))

    def width(self) -> object:
        """Return the dimensions of all tensors without the first, which counts the samples."""
        return tuple(one.shape[1:] for one in self.tensors if hasattr(one, "shape"))
