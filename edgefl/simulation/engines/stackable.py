"""Whether a task can be stacked exactly, and if not, why: first by inspection, then by a trial."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgefl.aggregation.mean import WeightedMean
from edgefl.errors import TaskError
from edgefl.records import Failure, Partial, Plan, Update
from edgefl.rounds import select_clients
from edgefl.settings.server import EXACT
from edgefl.simulation.engines.attempt import Attempt
from edgefl.simulation.engines.fleets import SimulationSetup
from edgefl.simulation.engines.stacked import NOT_IN_MEMORY, StackTrainer, joined, kind_of
from edgefl.simulation.engines.trainer import LocalTrainer
from edgefl.simulation.world.population import samples_of
from edgefl.task import Task, UserCode
from edgefl.terminal.user_code import place_of, quoted
from edgefl.training.adapters import adapters_of
from edgefl.training.local import make_model
from edgefl.training.parts import parts_of
from edgefl.training.randomness import Drawn, seeded
from edgefl.training.samples import Samples
from edgefl.training.structures import call, leaves
from edgefl.trees import Tree

if TYPE_CHECKING:
    import torch

NUM_TRIED = 3  # clients
TOLERANCE = 1e-3  # relative to the largest change; rounding is far below, a wrong computation far above
ULPS = 4  # allowed difference of a parameter, in units in the last place


def why_not_stacked(setup: SimulationSetup) -> str | None:
    """Return why the task cannot be stacked, or None if it can.

    Raises TaskError if a client of the trial fails in the loop, too: then the task is at fault and not the stacks.
    """
    if reason := _of_the_task(setup):
        return reason
    model = make_model(setup.task)
    return _of_the_model(model) or _of_a_trial(setup, model)


def why_not_chosen(setup: SimulationSetup) -> str | None:
    """Return the same for a choice of engines: an error of the task is left for the round to tell."""
    try:
        return why_not_stacked(setup)
    except TaskError:
        return "in a trial, a client fails in the loop, too"


def _of_the_task(setup: SimulationSetup) -> str | None:
    if setup.task.fit is not None:
        return "it has its own fit"
    if setup.states is not None:
        return "its clients keep a state between rounds"
    if setup.task.optimizer is not None:
        return "it has its own optimizer; stacked steps are plain SGD"
    if setup.config.train.algorithm != "fedavg":
        return f"train.algorithm={setup.config.train.algorithm} is one gradient per client; stacked are local steps"
    return None


def _of_the_model(model: torch.nn.Module) -> str | None:
    import torch

    if adapters := adapters_of("", model):
        return f"its adapters ({adapters[0].path} ..) are averaged as products, which stacked clients do not send"
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):  # noqa: SLF001 - the base of all of them
            return f"its layer {name!r} is batch norm, which mixes the samples of a batch"
        if isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0:  # noqa: SLF001 - as above
            return f"its layer {name!r} is dropout, and a stack has no separate random state for each client"
    parameters = dict(model.named_parameters())
    if odd := [name for name in model.state_dict() if name not in parameters]:
        return f"its state {odd[0]!r} is a buffer, or shared between layers"
    if not any(parameter.requires_grad for parameter in parameters.values()):
        return "none of its parameters is trained"
    return None


def _of_a_trial(setup: SimulationSetup, model: torch.nn.Module) -> str | None:
    """Train a few clients both ways, and compare; raises TaskError as `why_not_stacked` does."""
    parts = parts_of(setup.task, setup.config.train.seed)
    plan = Plan(
        job="trial",
        round=1,
        parameters=parts.moving,
        clients=select_clients(setup.population.names(), setup.config, 1),
        train=setup.config.train,
        deadline_s=setup.config.rounds.deadline_s,
        frozen=parts.frozen,
    )
    held, failed = _some_samples(setup, plan), ""
    if isinstance(held, str):
        return held
    with Attempt("stacked") as attempt:
        plan, held = _shortened(plan, held)
        singles = _alone(setup, plan, held)
        failed = next((one.reason for one in singles.values() if isinstance(one, Failure)), "")
        if not failed:
            updates = {client: one for client, one in singles.items() if isinstance(one, Update)}
            try:
                return _not_a_mean(setup.task, model, list(held.values())) or _differs(setup, plan, held, updates)
            except TaskError as error:
                cause = error.__cause__
                why = str(error) if cause is None else f"{quoted(cause)}{place_of(cause)}"
                return f"torch.func cannot map it over clients: {why}"
    if failed:
        raise TaskError(failed)
    return f"in a trial {attempt.fault}"


def _some_samples(setup: SimulationSetup, plan: Plan) -> dict[str, Samples] | str:
    """Return the samples of the first few clients that have some, of one kind; or why none can be stacked.

    Raises TaskError if none can load.
    """
    import torch

    held: dict[str, Samples] = {}
    first: TaskError | None = None
    for client in plan.clients[: 4 * NUM_TRIED]:
        try:
            samples = samples_of(setup.population, client, plan.train.seed)
        except TaskError as error:
            first = first or error
            continue  # reported in its own round
        if not isinstance(samples, Samples):
            return NOT_IN_MEMORY
        if not all(torch.isfinite(one).all() for one in leaves(samples.inputs)):
            continue  # a guard will refuse it; it cannot be compared
        if not held or kind_of(samples) == kind_of(next(iter(held.values()))):
            held[client] = samples
        if len(held) == NUM_TRIED:
            break
    if first is not None and not held:
        raise first
    return held or "no client of the first cohort has data for a trial"


def _not_a_mean(task: Task, model: torch.nn.Module, samples: list[Samples]) -> str | None:
    """Compare the loss of a batch with the mean of its samples' losses: masking relies on it."""
    import torch

    few = joined([one.first(NUM_TRIED) for one in samples])
    model.train()
    with seeded(0), torch.no_grad(), UserCode(task.name, "the loss of a single sample"):
        drawn = Drawn()
        together = _loss(task, model, few)
        singles = [_loss(task, model, one) for one in few.chunks(1)]
        if drawn.since():
            return "its model or loss draws from Python's or numpy's random state, and a stack has none for each client"
    mean = float(sum(singles) / len(singles))
    within = max(TOLERANCE, ULPS * torch.finfo(together.dtype).eps)
    if math.isclose(together, mean, rel_tol=within, abs_tol=within):
        return None
    return f"the loss of {len(few)} samples is {together:.6g}, the mean of their losses {mean:.6g}; expected a mean"


def _loss(task: Task, model: torch.nn.Module, samples: Samples) -> torch.Tensor:
    if task.loss is None:
        raise TaskError(f"task {task.name!r} has no loss")
    return task.loss(call(model, samples.inputs), samples.targets)


class _Tried:
    """A population of the clients of a trial."""

    def __init__(self, held: dict[str, Samples]) -> None:
        self._held = held

    def names(self) -> Sequence[str]:
        return list(self._held)

    def samples(self, client: str) -> Samples:
        return self._held[client]


def _shortened(plan: Plan, held: dict[str, Samples]) -> tuple[Plan, dict[str, Samples]]:
    """Return a trial of a full and a ragged step: after many steps, some models differ by rounding alone."""
    plan = dataclasses.replace(plan, train=dataclasses.replace(plan.train, epochs=1, steps=0, wire=EXACT))
    few = plan.train.batch_size + max(1, plan.train.batch_size // 2)
    return plan, {client: one.first(few) for client, one in held.items()}


def _alone(setup: SimulationSetup, plan: Plan, held: dict[str, Samples]) -> dict[str, Update | Failure]:
    """Train each client in the loop."""
    loop = LocalTrainer(setup.task, _Tried(held), setup.method)
    loop.begin(plan)
    return {client: loop.train(client) for client in held}


def _differs(setup: SimulationSetup, plan: Plan, held: dict[str, Samples], singles: Mapping[str, Update]) -> str | None:
    stacks = StackTrainer(setup.task, _Tried(held), setup.method)
    stacks.begin(plan)
    stack, sums, noise = stacks.train(held), WeightedMean(plan.parameters), _noise_of(stacks.start)
    for client, stacked in stack.updates(plan):
        if reason := _difference(stacked.tree, singles[client].tree, noise):
            return reason
        sums.add(singles[client])
    of_all = sums.partial()
    noise = {name: of_all.weight * one for name, one in noise.items()}
    seen = (_difference(one.total, of_all.total, noise) for one in stack.summed(plan) if isinstance(one, Partial))
    return next((reason for reason in seen if reason), None)


def _noise_of(start: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return each tensor's difference by rounding alone; it is large for 16-bit parameters."""
    import torch

    return {
        name: max(1e-7, ULPS * torch.finfo(one.dtype).eps * float(one.abs().max())) if one.numel() else 0.0
        for name, one in start.items()
        if one.is_floating_point()
    }


def _difference(stacked: Tree, single: Tree, noise: Mapping[str, float]) -> str | None:
    for name, wanted in single.items():
        largest, apart = np.abs(wanted).max(initial=0.0), np.abs(stacked[name] - wanted).max(initial=0.0)
        if not apart <= TOLERANCE * largest + noise.get(name, 0.0):  # also NaN
            return (
                f"in a trial its tensor {name!r} differs by {apart:.3g} from the loop's, whose largest is {largest:.3g}"
            )
    return None
