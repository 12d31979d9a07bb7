"""Federated evaluation on one device: the parameters that it received, on its own held-out samples.

A task with a model has `eval_data`, which is evaluated with its loss and metrics; one with `fit` has its own
`evaluate_locally`. Errors of the user's code, a device without samples, and numbers that cannot count become the
`fault` of the result, not an exception: the device's update counts all the same.
Invariant: a result depends only on (parameters, samples, seed, client), in any engine and on a device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from edgefl.errors import TaskError
from edgefl.guards import wrong_evaluation
from edgefl.records import DeviceEvaluation, EvaluationSpec
from edgefl.task import EvalResult, Task, UserCode
from edgefl.training.adapters import loader_options
from edgefl.training.evaluation import evaluate_model
from edgefl.training.local import data_seed, make_model, set_parameters
from edgefl.training.metrics import LOSS, numbers
from edgefl.training.randomness import seeded
from edgefl.training.samples import SampleSet, eval_samples
from edgefl.trees import Tree
from edgefl.trees.frozen import whole

if TYPE_CHECKING:
    import torch

DOING = "local evaluation"  # see `UserCode`


def evaluation_spec(task: Task) -> EvaluationSpec | None:
    """Return what the devices of a task report in federated evaluation; None if the task has none."""
    if task.eval_data is not None:
        return EvaluationSpec(directions={LOSS: False} | {name: task.direction_of(name) for name in task.metrics})
    if task.evaluate_locally is not None:
        return EvaluationSpec(directions=dict(task.higher_is_better), declared=False)
    return None


class LocalEvaluator:
    """Evaluates parameters for one device after another; call `begin` for each set of them."""

    def __init__(self, task: Task) -> None:
        self._task, self._spec = task, evaluation_spec(task)
        self._model: torch.nn.Module | None = None
        self._parameters: Tree = {}

    def begin(self, parameters: Tree, frozen: Tree | None) -> None:
        """Start with these parameters; raises TaskError if they do not match the model."""
        self._parameters = whole(parameters, frozen)
        if self._task.eval_data is not None:
            self._model = self._model if self._model is not None else make_model(self._task)
            set_parameters(self._task, self._model, self._parameters)

    def of_device(self, client: str, options: Mapping[str, str], seed: int, workers: int = 0) -> DeviceEvaluation:
        """Evaluate on the samples that a device's data options name; `seed` is the job's.

        `workers` processes read a Dataset, as in training.
        """
        own = data_seed(seed, client)
        if self._task.evaluate_locally is not None:
            return self._checked(lambda: self._by_itself(options, own))
        return self.of_samples(lambda: eval_samples(self._task, options, seed=own, workers=workers))

    def of_samples(self, load: Callable[[], SampleSet]) -> DeviceEvaluation:
        """Evaluate on the samples that `load` returns; it may raise TaskError."""
        return self._checked(lambda: self._on_samples(load()))

    def _on_samples(self, samples: SampleSet) -> DeviceEvaluation:
        if self._model is None:
            raise TaskError(f"task {self._task.name!r} has no eval_data")
        metrics = evaluate_model(self._task, self._model, samples, DOING)
        return DeviceEvaluation(metrics=metrics, weight=float(len(samples)))

    def _by_itself(self, options: Mapping[str, str], seed: int) -> DeviceEvaluation:
        task = self._task
        with seeded(seed), UserCode(task.name, "evaluate_locally"):
            found = task.evaluate_locally(self._parameters, options) if task.evaluate_locally is not None else None
        if not isinstance(found, EvalResult):
            raise TaskError(
                f"task {task.name!r}: evaluate_locally returned a {type(found).__name__}, not an edgefl.EvalResult"
            )
        if not isinstance(found.metrics, Mapping):
            raise TaskError(
                f"task {task.name!r}: evaluate_locally's metrics are a {type(found.metrics).__name__}; expected "
                "numbers by name"
            )
        metrics: dict[str, float] = {}
        for name, value in found.metrics.items():
            some = numbers(task.name, str(name), value)
            if twice := sorted(some.keys() & metrics.keys()):
                raise TaskError(f"task {task.name!r}: evaluate_locally returned two numbers {twice[0]!r}; rename one")
            metrics |= some
        try:
            return DeviceEvaluation(metrics=metrics, weight=float(found.weight))
        except (TypeError, ValueError) as cause:
            raise TaskError(f"task {task.name!r}: evaluate_locally's weight must be a number: {cause}") from cause

    def _checked(self, evaluate: Callable[[], DeviceEvaluation]) -> DeviceEvaluation:
        """Return an evaluation that can count, or one with the reason why there is none."""
        if self._spec is None:
            return DeviceEvaluation(fault=f"task {self._task.name!r} has no evaluation on devices")
        try:
            found = evaluate()
        except TaskError as error:
            return DeviceEvaluation(fault=str(error))
        fault = wrong_evaluation(found, self._spec)
        return found if fault is None else DeviceEvaluation(fault=f"task {self._task.name!r}: {fault}")


def evaluate_locally(  # noqa: PLR0913 - as of `train_locally`
    task: Task, parameters: Tree, *,
    options: Mapping[str, str], client: str, seed: int, workers: int = 0, frozen: Tree | None = None,
) -> DeviceEvaluation:  # fmt: skip
    """Evaluate parameters on this device's held-out samples; a failure is the `fault` of the result."""
    evaluator = LocalEvaluator(task)
    try:
        evaluator.begin(parameters, frozen)
    except TaskError as error:
        return DeviceEvaluation(fault=str(error))
    return evaluator.of_device(client, options if task.model is None else loader_options(options), seed, workers)
