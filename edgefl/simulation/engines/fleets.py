"""The base of every engine: the interfaces of populations and engines, the setup, and the count of bytes.

An engine is a `Fleet` (see `edgefl.rounds`) whose clients are trained on this machine; it is closed
when the simulation ends. Bytes are those that a deployed fleet would transfer: encoded trees.
Invariant: an engine's answer for a client depends only on (parameters, samples, config, round, client),
as on a device; so all engines agree.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

from edgefl.choosing.combined import LATE_NEXT
from edgefl.choosing.needs import reads_history
from edgefl.config import GRACE_NONE, JobConfig
from edgefl.records import Answer, Partial, Plan, Traffic
from edgefl.rounds import Fleet
from edgefl.settings.server import EXACT
from edgefl.simulation.engines.client_states import ClientStates, RoundBytes
from edgefl.task import Task
from edgefl.training.samples import SampleSet, require_torch
from edgefl.trees import encoded_bytes, in_form
from edgefl.trees.factors import is_low_rank


class Population(Protocol):
    """All clients, and their data. Lazy: only sampled clients cost anything."""

    def names(self) -> Sequence[str]:
        """Return every client's name, sorted; the sequence need not store them."""

    def samples(self, client: str) -> SampleSet:
        """Return a client's own samples; raises TaskError if it has none."""


@runtime_checkable
class WithOptions(Protocol):
    """A population whose clients have data options, which a task with its own `fit` reads."""

    def options(self, client: str) -> Mapping[str, str]:
        """Return one client's data options."""


@runtime_checkable
class WithEvalSamples(Protocol):
    """A population whose clients have held-out samples of their own, for federated evaluation."""

    def eval_samples(self, client: str) -> SampleSet:
        """Return a client's held-out samples; raises TaskError if it has none."""


PopulationMaker = Callable[[Task], Population]  # picklable, so that a worker process can create its own


class Engine(Fleet, Protocol):
    """A fleet of simulated clients."""

    def close(self) -> None:
        """End what the engine started."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingMethod:
    """How clients are trained; the result is the same, up to rounding."""

    stacks: bool = False  # whether workers train clients as one computation, or one after another
    compiled: bool = False  # whether steps are compiled with a C++ compiler
    recorded: bool = True  # whether steps are recorded, or computed as on a device


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulationSetup:
    """One simulation, as its engines see it."""

    task: Task
    reference: str | None  # from which the task can be loaded again, if known
    make_population: PopulationMaker
    population: Population
    config: JobConfig
    method: TrainingMethod = field(default_factory=TrainingMethod)
    stop: threading.Event = field(default_factory=threading.Event)  # if set, start no more clients
    served: set[tuple[str, str]] = field(default_factory=set)  # (job, client) pairs that have the frozen tensors
    states: ClientStates | None = None  # where clients keep what they need later; None = they keep nothing

    def takes_sums(self, plan: Plan) -> bool:
        """Whether partial sums are allowed: not with over-selection, grace, late answers, or a choice by history.

        Of adapters, each client's factors are smaller than any sum; fragments are of the clients' own models. Updates
        in fewer bits are rounded one by one.
        """
        rounds, has_fragments = self.config.rounds, self.config.server.fragments > 1
        if has_fragments or self.config.train.wire != EXACT or any(map(is_low_rank, plan.parameters)):
            return False
        if rounds.grace != GRACE_NONE or rounds.late == LATE_NEXT or reads_history(rounds):
            return False
        return self.config.rounds.clients in {0, len(plan.clients)} or len(plan.clients) < self.config.rounds.clients


@dataclass(frozen=True, slots=True)
class ModelInForm:
    """A fleet whose clients receive the model in fewer bits."""

    inner: Fleet
    form: str  # `server.wire`

    def clients(self) -> Sequence[str]:
        return self.inner.clients()

    def collect(self, plan: Plan) -> Iterator[Answer]:
        """Send the plan with the model that clients see, and yield their answers."""
        return self.inner.collect(replace(plan, parameters=in_form(plan.parameters, self.form)))

    def traffic(self) -> Traffic:
        return self.inner.traffic()


class Meter:
    """Counts the bytes that would be transferred; frozen tensors once per client."""

    def __init__(self, served: set[tuple[str, str]] | None = None, states: ClientStates | None = None) -> None:
        self._traffic = Traffic()
        self._served = set() if served is None else served
        self._states = states
        self._job, self._frozen_bytes = "", 0

    def begin(self, plan: Plan) -> None:
        """Record the sizes of this round's trees."""
        self._job, self._bytes = plan.job, RoundBytes(plan, self._states)
        self._frozen_bytes = encoded_bytes(plan.frozen) if plan.frozen else 0

    def count(self, answer: Answer) -> None:
        """Count the models sent for an answer, and the updates in it."""
        clients = answer.contributors if isinstance(answer, Partial) else (answer.device,)
        down_bytes = self._bytes.down_all(clients) + self._once(clients)
        self._traffic += Traffic(up_bytes=self._bytes.sent(answer), down_bytes=down_bytes)

    def _once(self, clients: Sequence[str]) -> int:
        """Return the bytes of frozen tensors for the clients that did not have them yet."""
        if not self._frozen_bytes:
            return 0
        before = len(self._served)
        self._served.update((self._job, client) for client in clients)
        return (len(self._served) - before) * self._frozen_bytes

    def traffic(self) -> Traffic:
        return self._traffic


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Set the number of torch threads inside; small models are fastest with one."""
    require_torch("simulation", "sim")
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
