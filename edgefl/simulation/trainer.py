"""One client after another, on one model that is made once: what `train_locally` does, at less cost.

A device makes a model for each round, copies parameters in and a state dict out, checked each time.
Here the check is made once a round, and the copies go straight between the model's own tensors and a
round's start.  Invariant: the update is that of `train_locally` for the same data, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np

from edgefl.errors import ConfigError, TaskError
from edgefl.records import Failure, Plan, Update
from edgefl.samples import Samples
from edgefl.simulation.fleets import Population
from edgefl.task import Task
from edgefl.training import (
    accumulate_gradient,
    derive_seed,
    gradient_of,
    make_model,
    set_parameters,
    train_epochs,
    train_locally,
)
from edgefl.trees import Array, Tree, subtract

if TYPE_CHECKING:
    import torch


@runtime_checkable
class WithOptions(Protocol):
    """A population whose clients have data options: what a task with its own `fit` reads."""

    def options(self, client: str) -> Mapping[str, str]:
        """Return one client's data options."""


class LocalTrainer:
    """Trains clients of one population; call `begin` for each plan."""

    def __init__(self, task: Task, population: Population) -> None:
        if task.fit is not None and not isinstance(population, WithOptions):
            raise ConfigError(
                f"task {task.name!r} brings its own fit, which reads data options; this population has none"
            )
        self._task, self._population = task, population
        self._model: torch.nn.Module | None = None
        self._plan: Plan | None = None
        self._start: dict[str, torch.Tensor] = {}

    def begin(self, plan: Plan) -> None:
        """Take up a plan; raises TaskError where its parameters are not the model's."""
        self._plan = plan
        if self._task.fit is not None:
            return
        import torch

        self._model = self._model if self._model is not None else make_model(self._task)
        set_parameters(self._task, self._model, plan.parameters)
        state = self._model.state_dict()
        self._start = {name: torch.clone(state[name]) for name in plan.parameters}

    def train(self, client: str) -> Update | Failure:
        """Return a client's answer; what its data or the user's code does wrong is its Failure."""
        plan = self._plan
        if plan is None:
            raise RuntimeError("begin comes before train")
        try:
            tree, weight, metrics = self._fit(plan, client)
        except TaskError as error:
            return Failure(job=plan.job, round=plan.round, device=client, reason=str(error))
        return Update(job=plan.job, round=plan.round, device=client, tree=tree, weight=weight, metrics=metrics)

    def _fit(self, plan: Plan, client: str) -> tuple[Tree, float, Mapping[str, float]]:
        if self._model is None:
            options = self._population.options(client) if isinstance(self._population, WithOptions) else {}
            result = train_locally(
                self._task, plan.parameters, plan.train, options=options, round=plan.round, client=client
            )
            return result.tree, result.weight, result.metrics
        samples = self._population.samples(client)
        tree, loss = self._trained(self._model, samples, plan, derive_seed(plan.train.seed, plan.round, client))
        return tree, float(len(samples)), {"train_loss": loss}

    def _trained(self, model: torch.nn.Module, samples: Samples, plan: Plan, seed: int) -> tuple[Tree, float]:
        self._reset(model)
        if plan.train.algorithm == "fedsgd":
            batch_size = plan.train.batch_size
            loss = accumulate_gradient(self._task, model, samples, batch_size=batch_size, seed=seed)
            return gradient_of(self._task, model, plan.parameters), loss
        loss = train_epochs(self._task, model, samples, plan.train, seed)
        return self._delta(model), loss

    def _reset(self, model: torch.nn.Module) -> None:
        import torch

        state = model.state_dict()
        with torch.no_grad():
            for name, start in self._start.items():
                state[name].copy_(start)

    def _delta(self, model: torch.nn.Module) -> dict[str, Array]:
        state = model.state_dict()
        return {name: _difference(state[name], start) for name, start in self._start.items()}


def _difference(new: Any, old: Any) -> Array:
    if new.is_floating_point():
        return np.asarray((new - old).cpu().numpy())
    return np.asarray(subtract(new.cpu().numpy(), old.cpu().numpy()))
