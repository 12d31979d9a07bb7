"""The tensors of one side: those that it trains, its buffers, and frozen ones, by one name for each.

Trained tensors are parameters, which the task's optimizer steps. Frozen ones share the memory of what they were made
from, such as a mapped file, so that many states of one model cost one copy.
Invariant: `restore(snapshot())` gives the side that takes the same next step, bit for bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgefl.config import TrainConfig
from edgefl.errors import TaskError
from edgefl.task import Task
from edgefl.training.steps.descent import Descent
from edgefl.training.steps.optimizer_state import OPTIMIZER
from edgefl.trees import Array, Tree
from edgefl.trees.tensors import array_of, tensor_of

if TYPE_CHECKING:
    import torch


class PartState:
    """One side's tensors and the optimizer over the trained ones."""

    def __init__(  # noqa: PLR0913 - what a side is made of
        self, task: Task, names: Sequence[str], tensors: Tree, *, trained: Collection[str], buffers: Collection[str],
        config: TrainConfig, before: Tree | None = None,
    ) -> None:  # fmt: skip
        """`tensors` has at least `names`; `before` is the optimizer's state after a former training, if kept.

        Raises TaskError for a missing tensor, which another bundle or cut would explain.
        """
        if missing := [name for name in names if name not in tensors]:
            raise TaskError(
                f"task {task.name!r}: {', '.join(missing):.500} is missing among the tensors of this part; the job was "
                "submitted with another model or cut"
            )
        self.tensors: dict[str, torch.Tensor] = {
            name: _owned(tensors[name], trained=name in trained) if name in trained or name in buffers
            else _shared(tensors[name])
            for name in names
        }  # fmt: skip
        self.trained: list[Any] = [self.tensors[name] for name in names if name in trained]  # parameters
        self._moving = [name for name in names if name in trained or name in buffers]
        self._descent = Descent(task, _Accumulated(self.trained), before)
        self._task, self._config = task, config
        if self.trained:  # an optimizer needs a parameter
            self._descent.begin(config)

    def step(self, loss: torch.Tensor) -> None:
        """Take a step with the gradients that were accumulated, and forget them."""
        if self.trained:
            self._descent.take(None, loss)
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Forget accumulated gradients, such as those of a batch that is given up."""
        for one in self.trained:
            one.grad = None

    def take_gradients(self) -> list[torch.Tensor | None]:
        """Return the accumulated gradients, and forget them here: another's may follow."""
        taken = [one.grad for one in self.trained]
        self.drop_gradients()
        return taken

    def put_gradients(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Go on accumulating where `take_gradients` has left off; nothing = from zero."""
        for one, gradient in zip(self.trained, gradients or [None] * len(self.trained), strict=True):
            one.grad = gradient

    def moving(self) -> dict[str, Array]:
        """Return copies of the trained tensors and the buffers."""
        return {name: np.array(array_of(self.tensors[name]), order="C") for name in self._moving}

    def kept(self) -> dict[str, Array]:
        """Return the optimizer's state; empty for plain SGD."""
        return self._descent.kept() if self.trained else {}

    def snapshot(self) -> dict[str, Array]:
        """Return all that a step changes."""
        return {**self.moving(), **self.kept()}

    def restore(self, snapshot: Tree) -> None:
        """Continue from a snapshot of a state that was made from the same tensors and settings."""
        import torch

        state = {name: snapshot[name] for name in snapshot if name.startswith(OPTIMIZER)}
        anchors = self._descent
        self._descent = Descent(self._task, _Accumulated(self.trained), state)
        if self.trained:
            self._descent.begin(self._config)
            self._descent.pull_to(anchors)
        with torch.no_grad():
            for name in self._moving:
                self.tensors[name].copy_(tensor_of(np.array(snapshot[name])))
        self.drop_gradients()


class _Accumulated:
    """The gradients that backward passes have accumulated, for `Descent`."""

    def __init__(self, trained: Sequence[torch.nn.Parameter]) -> None:
        self.trained = trained

    def __call__(self, inputs: object, targets: torch.Tensor) -> tuple[Sequence[torch.Tensor | None], torch.Tensor]:
        """Return the gradients, and the loss, which comes as the targets."""
        del inputs
        return [one.grad for one in self.trained], targets


def changes(state: Mapping[str, Array], before: Tree, names: Mapping[str, str]) -> dict[str, Array]:
    """Return the new tensors minus those before, under all names of each tensor; `names` maps them to the state's."""
    return {name: np.asarray(state[names[name]] - np.asarray(old)) for name, old in before.items()}


def _owned(array: Array, *, trained: bool) -> torch.Tensor:
    import torch

    tensor = tensor_of(np.array(array))
    return torch.nn.Parameter(tensor) if trained else tensor


def _shared(array: Array) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing writes to it
        return tensor_of(np.asarray(array))
