"""Wrong versions of the programs, each with one fault that a careless change could bring in.

A mutant is installed over the real code for the time of a run, like a substitute. That the simulator finds each of them
shows that it can fail.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from cloud.dataplane.open_round import OpenRound
from cloud.jobs.answers import AnswerRow
from cloud.region.server.work import RegionWork
from cloud.region.service import TierService
from cloud.region.sums import Folding
from cloud.state.jobs import Jobs
from edge_agent.link.lease import Lease
from edge_agent.link.outbox import Outbox
from edgefl.aggregation.mean import WeightedMean
from edgefl.faults.machine.threads import kernel

LATE_S = 0.5


def _commit_after_acknowledgement(real: Callable[..., Any]) -> Callable[..., Any]:
    """The cloud acknowledges an update, and commits it a little later."""

    def record(self: Jobs, job: str, number: int, *answers: AnswerRow) -> None:
        node = kernel().node

        def later() -> None:
            kernel().wait(None, LATE_S)
            real(self, job, number, *answers)

        if node is not None:
            node.spawn(later, "late-commit")

    return record


def _drop_spool_early(real: Callable[..., Any]) -> Callable[..., Any]:
    """A region forgets its devices' updates when it sends their sum, not when its parent has closed the round."""

    def deliver(self: RegionWork, key: Any, one: Any, folding: Folding, fleet: Any, model: str) -> None:
        self._deps.jobs.forget_round(key[0], one.number)
        real(self, key, one, folding, fleet, model)

    return deliver


def _accept_unchecked(real: Callable[..., Any]) -> Callable[..., Any]:  # noqa: ARG001 - in its place
    """The parent takes a sum without a look at whether its devices are counted already."""

    def accept_all(
        self: OpenRound, answers: Sequence[AnswerRow], make_durable: Callable[[Sequence[AnswerRow]], None]
    ) -> list[str]:
        new = [one for one in answers if self.waits_for(one.device)]
        make_durable(answers)
        for answer in new:
            self.accept(answer, lambda _answer: None)
        return []

    return accept_all


def _forget_before_sent(real: Callable[..., Any]) -> Callable[..., Any]:
    """A device forgets its update as soon as it begins to send it."""

    async def send(self: Outbox, key: Any, update: Any) -> None:
        self._store.mark_answered(*key)
        await real(self, key, update)

    return send


def _add_without_weight(real: Callable[..., Any]) -> Callable[..., Any]:
    """The mean forgets the weight of one update in the sum of weights."""

    def add(self: WeightedMean, update: Any) -> None:
        real(self, update)
        if update.weight > 40:
            self._weight -= 1.0

    return add


def _stay_for_ever(real: Callable[..., Any]) -> Callable[..., Any]:  # noqa: ARG001 - in its place
    """A device does not look whether the lease of its parent is over."""

    def is_over(self: Lease, now_s: float) -> bool:  # noqa: ARG001 - as the real one
        return False

    return is_over


def _refuse_nothing(real: Callable[..., Any]) -> Callable[..., Any]:  # noqa: ARG001 - in its place
    """The parent does not look at a sum before it receives it."""
    return lambda *_: None


def _any_model(real: Callable[..., Any]) -> Callable[..., Any]:  # noqa: ARG001 - in its place
    """A round takes updates that began with another model: of another region's round of this number."""
    return lambda *_: True


Change = tuple[type, str, Callable[[Callable[..., Any]], Callable[..., Any]]]  # class, method, what makes the wrong one
MUTANTS: Mapping[str, Sequence[Change]] = {
    "early-acknowledgement": [(Jobs, "record", _commit_after_acknowledgement)],
    "early-drop": [(RegionWork, "_deliver", _drop_spool_early)],
    "unchecked-sum": [(TierService, "_refusal", _refuse_nothing), (OpenRound, "accept_all", _accept_unchecked)],
    "early-forget": [(Outbox, "_send", _forget_before_sent)],
    "unchecked-lease": [(Lease, "is_over", _stay_for_ever)],
    "any-model": [(OpenRound, "is_of", _any_model)],
    "wrong-weight": [(WeightedMean, "add", _add_without_weight)],
}


@contextlib.contextmanager
def installed(name: str) -> Iterator[None]:
    """Run a mutant's code in place of the real one within the block; an empty name changes nothing."""
    if not name:
        yield
        return
    with contextlib.ExitStack() as changes:
        for owner, method, make in MUTANTS[name]:
            real = getattr(owner, method)
            changes.callback(setattr, owner, method, real)
            setattr(owner, method, make(real))
        yield
