"""Train one client after another on one model: the same as `train_locally`, at lower cost.

A device creates a model in each round, copies parameters in and a state dict out, and checks both.
Here the check is done once per round, the model is in one flat buffer, and its steps are recorded.
Invariant: the update equals that of `train_locally` for the same data: bit for bit if each step needs the
whole gradient (with an optimizer or a proximal term), else up to a few units in the last place.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgefl.errors import ConfigError, TaskError
from edgefl.guards import not_finite_tree
from edgefl.records import Evaluated, Failure, Plan, Update
from edgefl.simulation.engines.client_states import ClientStates
from edgefl.simulation.engines.fleets import Population, TrainingMethod, WithOptions
from edgefl.simulation.isolation.at_work import turn_of
from edgefl.simulation.steps import FlatModel, make_step
from edgefl.simulation.world.evaluation import ClientEvaluations
from edgefl.simulation.world.population import samples_of
from edgefl.task import Task
from edgefl.training.adapters import adapters_of, rank_of, restart, with_factors
from edgefl.training.local import (
    accumulate_gradient,
    adapter_seed,
    as_sent,
    derive_seed,
    gradient_of,
    make_model,
    set_parameters,
    train_epochs,
    train_locally,
    tree_of,
    views_of,
)
from edgefl.training.samples import SampleSet
from edgefl.training.steps.client_state import RoundStart, begin_from, model_state
from edgefl.training.steps.layout import has_channels_last, lay_out
from edgefl.trees import Tree, subtract
from edgefl.trees.fragments import changed_part
from edgefl.trees.frozen import refuse_moved, refuse_other_parts, whole
from edgefl.trees.tensors import array_of


class LocalTrainer:
    """Trains clients of one population; call `begin` for each plan."""

    def __init__(
        self, task: Task, population: Population, method: TrainingMethod | None = None,
        states: ClientStates | None = None,
    ) -> None:  # fmt: skip
        if task.fit is not None and not isinstance(population, WithOptions):
            raise ConfigError(f"task {task.name!r} has its own fit, which reads data options; this population has none")
        self._task, self._population = task, population
        self._method, self._states = method or TrainingMethod(), states
        self._models: dict[int | None, _Model] = {}  # by the rank of their adapters
        self._begun_with: set[int | None] = set()  # ranks whose models have the plan's parameters
        self._plan: Plan | None = None
        self._evaluations = ClientEvaluations(task, population)

    def begin(self, plan: Plan) -> None:
        """Start with a plan; raises TaskError if its parameters do not match the model."""
        self._plan = plan
        self._evaluations.begin(plan)
        self._begun_with = set()
        if self._task.fit is None and plan.fit and not plan.train.lora_ranks:
            self._model_of(plan, None)

    def _model_of(self, plan: Plan, rank: int | None) -> _Model:
        if rank not in self._models:
            self._models[rank] = _Model(self._task, plan.frozen, self._method, rank)
        if rank not in self._begun_with:
            self._models[rank].begin(plan)
            self._begun_with.add(rank)
        return self._models[rank]

    def train(self, client: str, *, borrow: bool = False) -> Update | Failure:
        """Return a client's answer; errors of its data or of the user's code become a Failure.

        A borrowed update is in the trainer's own memory: it is valid only until the next client trains.
        """
        plan = self._begun()
        try:
            turn_of(client)
            tree, weight, metrics = self._fit(plan, client, borrow=borrow)
        except TaskError as error:
            return Failure(job=plan.job, round=plan.round, device=client, reason=str(error))
        sent = as_sent(tree, plan.train, plan.round, client)
        return Update(
            job=plan.job, round=plan.round, device=client, tree=sent, weight=weight, metrics=metrics,
            evaluation=self._evaluations.of(client) if plan.evaluate else None,
        )  # fmt: skip

    def answer(self, client: str) -> Update | Failure | Evaluated:
        """Return what the plan asks of a client: an update, or only an evaluation."""
        return self.train(client) if self._begun().fit else self._evaluations.alone(client)

    def _begun(self) -> Plan:
        if self._plan is None:
            raise RuntimeError("begin comes before train")
        return self._plan

    def _fit(self, plan: Plan, client: str, *, borrow: bool) -> tuple[Tree, float, Mapping[str, float]]:
        if self._task.fit is not None:
            options = self._population.options(client) if isinstance(self._population, WithOptions) else {}
            result = train_locally(
                self._task, plan.parameters, plan.train, options=options, round=plan.round, client=client,
                frozen=plan.frozen,
            )  # fmt: skip
            return result.tree, result.weight, result.metrics
        samples = samples_of(self._population, client, plan.train.seed)
        seed = derive_seed(plan.train.seed, plan.round, client)
        model = self._model_of(plan, rank_of(self._task.name, plan.train, {}, client))
        if self._states is None:
            tree, loss = model.trained(samples, plan, seed, borrow=borrow)
        else:
            tree, loss = self._kept(self._states, model, client, samples, seed)
        return tree, float(len(samples)), {"train_loss": loss}

    def _kept(
        self, states: ClientStates, model: _Model, client: str, samples: SampleSet, seed: int
    ) -> tuple[Tree, float]:
        """Train a client from what it kept, as a device does; return its update and its loss."""
        plan = self._begun()
        before, parameters = states.before(client, plan.round), plan.parameters
        has_own = states.has(client, plan.round - 1)
        begun = begin_from(changed_part(parameters, plan.train) if has_own else parameters, before, plan.train)
        update, loss, state = model.trained_from(begun, samples, plan, seed, before)
        if not not_finite_tree(update):  # else a device sends nothing, and keeps the former state
            states.keep(client, plan.round, state)
        return update, loss


class _Model:
    """The model, and its training steps."""

    def __init__(self, task: Task, frozen: Tree | None, method: TrainingMethod, rank: int | None) -> None:
        self._task, self.module = task, make_model(task, rank=rank)
        self._adapters = adapters_of(task.name, self.module)
        self._still = [*(frozen or {}).keys() - {one.weight for one in self._adapters}]  # checked after training
        if frozen is not None:
            refuse_other_parts(task.name, self.module, frozen)
        channels_last = has_channels_last(self.module)
        if channels_last:
            lay_out(self.module)
        self.flat = FlatModel(self.module, channels_last=channels_last, still=frozen or {})
        self._step = make_step(task, self.module, recorded=method.recorded, compiled=method.compiled)

    def begin(self, plan: Plan) -> None:
        """Start a round from the plan's parameters; raises TaskError if they do not match the model."""
        set_parameters(self._task, self.module, whole(plan.parameters, plan.frozen))
        self.module.train()
        if not self._adapters:
            self.flat.start_from(plan.parameters)
            return
        restart(self.module, self._adapters, adapter_seed(plan.train.seed, plan.round))
        state = self.module.state_dict()
        own = {name: array_of(state[name]) for one in self._adapters for name in one.factor_names}
        matrices = {one.matrix for one in self._adapters}
        self.flat.start_from({**own, **{name: plan.parameters[name] for name in plan.parameters.keys() - matrices}})

    def trained_from(
        self, begun: RoundStart, samples: SampleSet, plan: Plan, seed: int, before: Tree | None
    ) -> tuple[Tree, float, Tree]:
        """Return a client's update, its loss and what it keeps; `before` is what it kept after its former training."""
        self._step.before = before
        if plan.train.fragments > 1:
            self.flat.start_from(begun.start)
        whole_update, loss = self.trained(samples, plan, seed, borrow=False)
        state = dict(self._step.kept()) if plan.train.keep_optimizer_state else {}
        if plan.train.fragments == 1:
            return whole_update, loss, state
        trained = tree_of(self._task, self.module, begun.start)
        update = {name: np.asarray(subtract(trained[name], np.asarray(old))) for name, old in begun.sent.items()}
        return update, loss, {**state, **model_state(begun, trained, plan.train)}

    def trained(self, samples: SampleSet, plan: Plan, seed: int, *, borrow: bool) -> tuple[Tree, float]:
        """Return a client's update, and its loss."""
        self.flat.reset()
        if plan.train.algorithm == "fedsgd":
            batch_size = plan.train.batch_size
            loss = accumulate_gradient(self._task, self.module, samples, batch_size=batch_size, seed=seed)
            return gradient_of(self._task, self.module, plan.parameters), loss
        loss = train_epochs(self._task, self.module, samples, plan.train, seed, self._step)
        if plan.frozen and self._still:
            still = {name: plan.frozen[name] for name in self._still}
            refuse_moved(self._task.name, views_of(self._task, self.module, still), still)
        if not self._adapters:
            return self.flat.moved() if borrow else self.flat.delta(), loss
        own, moved = {name for one in self._adapters for name in one.factor_names}, self.flat.delta()
        return with_factors(self._adapters, {name: one for name, one in moved.items() if name not in own}), loss
