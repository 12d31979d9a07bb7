"""Evaluation of parameters: the loss and the task's metrics on its held-out test data.

Used by runs and simulations after each round, by a task's Flower app, when a model is published, and by the gate
for compressed files (`edgefl.models.gate`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from edgefl.errors import TaskError
from edgefl.task import Task, UserCode
from edgefl.training.broadcast import refuse_broadcast
from edgefl.training.local import make_model, set_parameters
from edgefl.training.metrics import Evaluation, numbers
from edgefl.training.randomness import seeded
from edgefl.training.samples import SampleSet, test_samples
from edgefl.training.steps.descent import loss_of
from edgefl.training.structures import Structure, call
from edgefl.trees import Tree

if TYPE_CHECKING:
    import torch

EVALUATION_BATCH = 128


class Judge:
    """Evaluates parameters on the task's test data, or by its own `evaluate`; without either there are no metrics.

    `options` are for the loader; `workers` processes read a Dataset, as in training; `computing` is a context around
    each evaluation, e.g. to use more threads.
    """

    def __init__(
        self, task: Task, options: Mapping[str, str] | None = None,
        computing: Callable[[], AbstractContextManager[object]] = nullcontext, workers: int = 0,
    ) -> None:  # fmt: skip
        self._task, self._computing = task, computing
        self._tools: tuple[Any, Any] | None = None
        if task.model is not None and task.test_data is not None:
            self._tools = (make_model(task), test_samples(task, options or {}, workers=workers))

    @property
    def can(self) -> bool:
        """Whether the task can be evaluated."""
        return self._tools is not None or self._task.evaluate is not None

    def __call__(self, parameters: Tree) -> dict[str, float]:
        """Return `loss` and each metric, or what the task's `evaluate` returns; empty if it has neither."""
        if self._task.evaluate is not None:
            with self._computing():
                return _by_itself(self._task, parameters)
        if self._tools is None:
            return {}
        model, samples = self._tools
        with self._computing():
            set_parameters(self._task, model, parameters)
            return evaluate_model(self._task, model, samples)


def evaluate(task: Task, parameters: Tree, options: Mapping[str, str] | None = None) -> dict[str, float]:
    """Evaluate one set of parameters with a `Judge`."""
    return Judge(task, options)(parameters)


def _by_itself(task: Task, parameters: Tree) -> dict[str, float]:
    with seeded(0), UserCode(task.name, "evaluate"):
        found = task.evaluate(parameters) if task.evaluate is not None else {}
    if not isinstance(found, Mapping):
        raise TaskError(f"task {task.name!r}: evaluate returned a {type(found).__name__}; expected metrics by name")
    named = {str(name): value for name, value in found.items()}
    return {key: one for name, value in named.items() for key, one in numbers(task.name, name, value).items()}


def evaluate_model(
    task: Task, model: torch.nn.Module, samples: SampleSet, doing: str = "evaluation",
    watch: Callable[[Structure, Structure], object] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Return `loss`, a mean over the samples, and each metric of the task over all of them.

    `watch` is called with the outputs and targets of each batch.
    """
    import torch

    model.eval()
    with torch.no_grad(), seeded(0), UserCode(task.name, doing):
        evaluation = Evaluation(task.name, task.metrics)
        for chunk in samples.chunks(EVALUATION_BATCH):
            outputs = call(model, chunk.inputs)
            if task.loss is not None:
                refuse_broadcast(task.name, task.loss, outputs, chunk.targets)
            evaluation.add(outputs, chunk.targets, float(loss_of(task, outputs, chunk.targets)), len(chunk))
            if watch is not None:
                watch(outputs, chunk.targets)
        return evaluation.result()
