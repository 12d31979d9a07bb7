"""Virtual time: a fleet around another fleet, whose clients answer at the times that their machines would need.

The inner fleet trains as fast as this machine can; `VirtualFleet` delivers its answers in the order and
at the times of the schedule, and moves the clock to each. It asks the inner fleet only for the answers that
the round will use: the first `rounds.clients` to arrive, and others if one of them fails.
The exchange (`edgefl.exchange`) decides when a round ends, as in a deployed fleet; here the times of events come
from the schedule.
With `rounds.late`, a client goes on when its round is over, as a device does; it is trained at the start of the next
round, which gets its answer at its time, and it starts that round's work later.
Invariant: the answers, their order and their virtual times do not depend on real speed.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from edgefl.choosing.combined import LATE_NEXT
from edgefl.config import GRACE_AUTO, RoundsConfig
from edgefl.exchange import (
    Admitted,
    Answered,
    Begin,
    Durations,
    Event,
    Exchange,
    Failed,
    Late,
    Offline,
    Terms,
    Tick,
    Withdrawn,
    cohort_size,
    gathering,
)
from edgefl.guards import is_late
from edgefl.records import Answer, Failure, Partial, Plan, Traffic, Update
from edgefl.rounds import Fleet
from edgefl.simulation.engines.client_states import ClientStates, RoundBytes
from edgefl.simulation.world.devices import Devices
from edgefl.simulation.world.schedule import NumSamples, Schedule, make_schedule
from edgefl.simulation.world.tiers import TieredFleet
from edgefl.trees import encoded_bytes

REAL_DEADLINE_S = 86_400.0  # for the inner fleet, in real seconds: only an engine that hangs reaches it
WAIT_STEPS = 100  # checks of the fleet in one wait for clients


class VirtualClock:
    """Seconds since the simulation began. Call it to read it; usable as `Job.clock`."""

    def __init__(self, now_s: float = 0.0) -> None:
        self._now_s = now_s

    def __call__(self) -> float:
        return self._now_s

    def move_to(self, now_s: float) -> None:
        """Move forward; time never goes back."""
        self._now_s = max(self._now_s, now_s)


@dataclass(frozen=True, slots=True)
class _AtWork:
    """A client that goes on with a round that is over."""

    plan: Plan
    done_s: float  # when its update arrives


_Timed = tuple[float, Answer]  # when it arrives


class VirtualFleet:
    """The inner fleet's clients on their own machines and links, in virtual time."""

    def __init__(  # noqa: PLR0913 - as it was in a checkpoint, with defaults
        self, inner: Fleet, devices: Devices, clock: VirtualClock, *,
        rounds: RoundsConfig, num_samples: NumSamples, first_round: int = 1, served: set[tuple[str, str]] | None = None,
        tiered: TieredFleet | None = None, noticed_s: float = 0.0, meets: Callable[[str, int], bool] | None = None,
        states: ClientStates | None = None,
    ) -> None:  # fmt: skip
        """`noticed_s`: how long after a client went offline this is known, as a deployed fleet's keep-alive."""
        self._inner, self._devices, self._clock = inner, devices, clock
        self._rounds, self._num_samples = rounds, num_samples
        self._meets = meets  # whether a client may take part in a round; None = all may
        self._next_round, self._noticed_s, self._states = first_round, noticed_s, states
        self._served = served if served is not None else set()  # see `SimulationSetup`
        self._tiered = tiered  # `inner`, if there are regions above the clients
        self._traffic = Traffic()
        self._refused: set[str] = set()  # clients whose answer the guard has refused since it was yielded
        self._at_work: Mapping[str, _AtWork] = {}  # clients that go on with the last round
        self.durations = Durations()  # of the job's rounds so far

    def clients(self) -> Sequence[str]:
        """Return the available clients, after waiting for them as the deployed fleet does.

        Of a very large population, only as many random ones as the cohort needs: see `Devices.available`.
        """
        there: Sequence[str] = ()
        for num_clients, wait_s in gathering(self._rounds, is_first=self._next_round == 1):
            there = there if len(there) >= num_clients else self._wait_for(num_clients, wait_s)
        return there

    def collect(self, plan: Plan) -> Iterator[Answer]:
        """Yield answers in virtual order, each at its time; late and lost clients never answer.

        Evaluation takes no virtual time: not beside the training, and not after the last round.
        """
        if not plan.fit:
            self._count(down_bytes=len(plan.clients) * encoded_bytes(plan.parameters))
            yield from self._asked(plan, plan.clients)
            return
        self._next_round = plan.round + 1
        start_s = self._clock()
        have = {client for job, client in self._served if job == plan.job} if plan.frozen else set()
        owed = {client: self._at_work[client] for client in plan.owed if client in self._at_work}
        busy = {client: one.done_s for client, one in owed.items()}
        moved = RoundBytes(plan, self._states)
        schedule = make_schedule(self._devices, plan, self._num_samples, start_s, have, busy=busy, moved=moved)
        if self._tiered is not None:
            schedule = self._tiered.delayed(schedule, plan, start_s)
        fetching = [client for client in plan.clients if client not in schedule.refused]
        self._count(down_bytes=moved.down_all(fetching))
        if plan.frozen:
            self._count(down_bytes=len(set(fetching) - have) * encoded_bytes(plan.frozen))
            self._served.update((plan.job, client) for client in fetching)
        terms = Terms.of_round(self._rounds, plan.deadline_s, plan.clients, self.durations)
        exchange = Exchange(plan.clients, terms, owed)
        exchange.handle(Begin(at_s=start_s))
        try:
            yield from self._until_closed(plan, schedule, exchange, self._late(owed, schedule.end_s))
        finally:
            self._at_work = self._left_at_work(plan, schedule, exchange)
            if self._rounds.grace == GRACE_AUTO:
                self.durations.learn(exchange.took_s, exchange.missed_s)

    def _late(self, owed: Mapping[str, _AtWork], until_s: float) -> deque[_Timed]:
        """Train the clients that still work for the round before; return their updates, the earliest first."""
        coming = sorted((one.done_s, client) for client, one in owed.items() if one.done_s <= until_s)
        if not coming:
            return deque()
        before = dataclasses.replace(owed[coming[0][1]].plan, owed=(), evaluate=False)
        answers = self._asked(before, tuple(client for _, client in coming))
        updates = {answer.device: answer for answer in answers if isinstance(answer, Update)}
        return deque((max(at_s, self._clock()), updates[client]) for at_s, client in coming if client in updates)

    def _left_at_work(self, plan: Plan, schedule: Schedule, exchange: Exchange) -> Mapping[str, _AtWork]:
        """Return the clients that have begun to work for a round which is over, and have not answered."""
        if self._rounds.late != LATE_NEXT:
            return {}
        over_s = self._clock() if exchange.closed_s is None else exchange.closed_s
        return {
            client: _AtWork(plan, at_s)
            for client, at_s in schedule.arrivals.items()
            if at_s > over_s >= schedule.begins.get(client, 0.0)
            and client in exchange.missing
            and client not in schedule.refused
        }

    def _timed(self, plan: Plan, schedule: Schedule, late: deque[_Timed]) -> Iterator[_Timed]:
        """Yield the answers with their times, those of the round before between the others."""
        for answer in self._answers(plan, schedule):
            at_s = max(self._clock(), *(schedule.arrivals.get(client, 0.0) for client in _clients_of(answer)))
            while late and late[0][0] <= at_s:
                yield late.popleft()
            yield at_s, answer
        yield from late

    def _until_closed(
        self, plan: Plan, schedule: Schedule, exchange: Exchange, late: deque[_Timed]
    ) -> Iterator[Answer]:
        presence, moved = deque(presence_in(schedule, self._noticed_s)), RoundBytes(plan)
        for at_s, answer in self._timed(plan, schedule, late):
            clients, comes_late = _clients_of(answer), isinstance(answer, Update) and is_late(answer, plan)
            while presence and presence[0].at_s <= at_s:
                exchange.handle(presence.popleft())
            event = Late if comes_late else Failed if isinstance(answer, Failure) else Answered
            exchange.handle(*(event(client, at_s=at_s) for client in clients))
            if exchange.closed_s is not None and exchange.closed_s < at_s:
                break
            self._clock.move_to(at_s)
            self._count(up_bytes=moved.sent(answer))
            yield answer  # also from an unknown client, or a second one: the guard refuses these by name
            if comes_late:
                self._refused.difference_update(clients)
                continue
            kind = Admitted if self._refused.isdisjoint(clients) else Withdrawn
            exchange.handle(*(kind(client, at_s=at_s) for client in clients))
            self._refused.difference_update(clients)
        self._clock.move_to(_end_s(exchange, presence))

    def refuse(self, _plan: Plan, answer: Update | Partial, _reason: str) -> None:
        """Note that the guard has refused an answer."""
        self._refused.update(_clients_of(answer))

    def traffic(self) -> Traffic:
        return self._traffic if self._tiered is None else self._tiered.traffic()

    def _wait_for(self, wanted: int, limit_s: float) -> list[str]:
        """Move the clock until `wanted` clients are available, or to the limit; returns the available clients."""
        cohort = cohort_size(self._rounds) if self._meets is None else 0  # of random ones, too few may meet it
        start_s = self._clock()
        for step in range(WAIT_STEPS + 1):
            self._clock.move_to(start_s + limit_s * step / WAIT_STEPS)
            there = self._devices.available(
                self._clock(), wanted=max(cohort, wanted) if cohort else 0, round_number=self._next_round
            )
            if self._meets is not None:
                there = [client for client in there if self._meets(client, self._next_round)]
            if len(there) >= wanted or limit_s <= 0 or wanted > len(self._devices.names):
                break
        return there

    def _answers(self, plan: Plan, schedule: Schedule) -> Iterator[Answer]:
        """Ask the clients that arrive first, as many as needed; then another one for each that failed."""
        coming = iter(schedule.arrivals)
        num_wanted = self._rounds.clients or len(plan.clients)
        if self._tiered is not None and self._tiered.region_rounds > 1:
            num_wanted = len(plan.clients)  # a region trains as a whole
        while wave := tuple(islice(coming, num_wanted)):
            num_answers = num_failed = 0
            for answer in self._in_order(plan, wave, schedule):
                num_answers += 1
                num_failed += isinstance(answer, Failure)
                yield answer
            if not num_answers:  # the inner fleet was stopped
                return
            num_wanted = max(1, num_failed)

    def _in_order(self, plan: Plan, wave: tuple[str, ...], schedule: Schedule) -> Iterator[Answer]:
        """Yield the wave's answers in its order; an earlier answer waits for its turn.

        A partial sum's turn is that of the last client in it.
        """
        turn_of, turn = {client: turn for turn, client in enumerate(wave)}, 0
        held: dict[int, Answer] = {
            turn_of[client]: Failure(job=plan.job, round=plan.round, device=client, reason=schedule.refused[client])
            for client in wave
            if client in schedule.refused
        }
        there = {wave[turn] for turn in held}
        for answer in self._asked(plan, tuple(client for client in wave if client not in there)):
            clients = _clients_of(answer)
            if not there.isdisjoint(clients) or not turn_of.keys() >= set(clients):
                yield answer  # a second one, or from an unknown client: the guard refuses it
                continue
            held[max(turn_of[client] for client in clients)] = answer
            there.update(clients)
            while turn < len(wave) and wave[turn] in there:
                if turn in held:
                    yield held.pop(turn)
                turn += 1
        yield from (held[turn] for turn in sorted(held))

    def _asked(self, plan: Plan, clients: tuple[str, ...]) -> Iterator[Answer]:
        if clients:
            yield from self._inner.collect(dataclasses.replace(plan, clients=clients, deadline_s=REAL_DEADLINE_S))

    def _count(self, *, up_bytes: int = 0, down_bytes: int = 0) -> None:
        self._traffic += Traffic(up_bytes=up_bytes, down_bytes=down_bytes)


def _clients_of(answer: Answer) -> tuple[str, ...]:
    return answer.contributors if isinstance(answer, Partial) else (answer.device,)


def presence_in(schedule: Schedule, noticed_s: float = 0.0) -> list[Event]:
    """Return when each client is known to be offline, in order; within a round none comes back."""
    events = (Offline(client, at_s=at_s + noticed_s) for client, at_s in schedule.lost.items())
    return sorted(events, key=lambda one: one.at_s)


def _end_s(exchange: Exchange, events: Iterable[Event]) -> float:
    """Return when a round ends if no further answer arrives."""
    exchange.handle(*events)
    while exchange.closed_s is None:
        exchange.handle(Tick(at_s=exchange.due_s))
    return exchange.closed_s
