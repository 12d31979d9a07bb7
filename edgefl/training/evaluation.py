"""Evaluation of parameters: the loss and the task's metrics on its held-out test data, as means over the samples.

Used by runs and simulations after each round, by a task's Flower app, when a model is published, and by the gate
for compressed files (`edgefl.models.gate`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from edgefl.task import Task, UserCode
from edgefl.training.local import loss_of, make_model, set_parameters
from edgefl.training.randomness import seeded
from edgefl.training.samples import Samples, test_samples
from edgefl.trees import Tree

if TYPE_CHECKING:
    import torch

EVALUATION_BATCH = 128


class Judge:
    """Evaluates parameters on the task's test data; returns no metrics if there is none.

    `options` are for the loader; `computing` is a context around each evaluation, e.g. to use more threads.
    """

    def __init__(
        self, task: Task, options: Mapping[str, str] | None = None,
        computing: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:  # fmt: skip
        self._task, self._computing = task, computing
        self._tools: tuple[Any, Any] | None = None
        if task.model is not None and task.test_data is not None:
            self._tools = (make_model(task), test_samples(task, options or {}))

    @property
    def can(self) -> bool:
        """Whether the task can be evaluated."""
        return self._tools is not None

    def __call__(self, parameters: Tree) -> dict[str, float]:
        """Return `loss` and each metric; empty if the task has no model or no test data."""
        if self._tools is None:
            return {}
        model, samples = self._tools
        with self._computing():
            set_parameters(self._task, model, parameters)
            return evaluate_model(self._task, model, samples)


def evaluate(task: Task, parameters: Tree, options: Mapping[str, str] | None = None) -> dict[str, float]:
    """Evaluate one set of parameters with a `Judge`."""
    return Judge(task, options)(parameters)


def evaluate_model(task: Task, model: torch.nn.Module, samples: Samples) -> dict[str, float]:
    """Return `loss` and each metric as means over the samples."""
    import torch

    totals: dict[str, float] = {}
    model.eval()
    with torch.no_grad(), seeded(0), UserCode(task.name, "evaluation"):
        for chunk in samples.chunks(EVALUATION_BATCH):
            outputs = model(chunk.inputs)
            values = {"loss": float(loss_of(task, outputs, chunk.targets))}
            values |= {name: float(metric(outputs, chunk.targets)) for name, metric in task.metrics.items()}
            for name, value in values.items():
                totals[name] = totals.get(name, 0.0) + value * len(chunk)
    return {name: total / len(samples) for name, total in totals.items()}
