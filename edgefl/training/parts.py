"""The two parts of a job's tensors: those that change in its rounds, and the frozen ones.

Trained tensors and buffers are sent in every round and changed by the server's step. All others are
fetched once. A parameter is trained if it requires a gradient, under each of its names; for a task with its own
`fit`, if `Task.trained` lists it, or always. Of adapters, the matrices change that they add to the base's weights.
Invariant: the parts have no name in common, and together they are the initial parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgefl.errors import TaskError
from edgefl.task import Task
from edgefl.training.adapters import adapters_of
from edgefl.training.local import buffer_names, initial_parameters, make_model
from edgefl.trees import Tree
from edgefl.trees.views import renamed


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """A job's tensors."""

    moving: Tree
    frozen: Tree
    buffers: tuple[str, ...]  # the changing tensors that move by their mean, not by the optimizer

    def split(self, tensors: Tree) -> Parts:
        """Return the same parts with other values."""
        moving, frozen = (renamed(tensors, {name: name for name in part}) for part in (self.moving, self.frozen))
        return Parts(moving=moving, frozen=frozen, buffers=self.buffers)


def parts_of(task: Task, seed: int = 0) -> Parts:
    """Return the parts of a task's initial parameters; raises TaskError if nothing is trained."""
    tensors = initial_parameters(task, seed)
    buffers = buffer_names(task)
    trained = _trained_names(task, tensors)
    if not trained:
        raise TaskError(f"task {task.name!r} trains nothing: no parameter of its model requires a gradient")
    moves = trained | set(buffers)
    return Parts(
        moving=renamed(tensors, {name: name for name in tensors if name in moves}),
        frozen=renamed(tensors, {name: name for name in tensors if name not in moves}),
        buffers=buffers,
    )


def _trained_names(task: Task, tensors: Tree) -> frozenset[str]:
    if task.model is not None:
        model = make_model(task)
        named = model.named_parameters(remove_duplicate=False)
        matrices = frozenset(one.matrix for one in adapters_of(task.name, model))
        return matrices | frozenset(name for name, parameter in named if parameter.requires_grad and name in tensors)
    if task.trained is None:
        return frozenset(tensors)
    if unknown := sorted(set(task.trained) - tensors.keys()):
        raise TaskError(f"task {task.name!r}: trained names {', '.join(unknown):.500}, which `initial` does not return")
    return frozenset(task.trained)
