"""The same trace of events ends the same by the exchange alone, in the cloud's rounds, in relays and in virtual time.

Each driver is the real one on real parts (database, spool, blobs); a test is its devices, its disk and its clock.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings

from cloud.dataplane.grpc_fleet import FleetDependencies, GrpcFleet
from cloud.dataplane.live_relay import RelayTiming
from cloud.dataplane.open_round import Presence
from cloud.dataplane.open_rounds import OpenRounds
from cloud.dataplane.relays import RelayDependencies, Relays
from cloud.jobs.answers import AnswerRow
from cloud.state.blobs import BlobStore
from cloud.state.jobs import Jobs
from cloud.state.relay_rows import RelayMessage, RelayRows
from cloud.state.spool import Spool
from cloud.state.storage import Storage
from cloud.state.store import open_database
from edgefl.config import JobConfig, RoundsConfig
from edgefl.exchange import Answered, Back, Event, Failed, GiveUpReason, Late, Offline, Paused, Resumed, Terms
from edgefl.protocols.manifest import new_fleet_key, sign
from edgefl.protocols.messages import BlobRef, RoundClosed
from edgefl.records import Failure, Plan, Traffic, Update
from edgefl.simulation.world import clock as virtual
from edgefl.simulation.world.schedule import Schedule
from edgefl.testing import ManualClock, make_update
from edgefl.trees import write_tree
from tests.cloud.dataplane.rounds import FakeLink
from tests.edgefl.exchange.traces import Trace, end_of, law, named, traces

PARAMETERS = {"w": np.zeros(2, np.float32)}
CONTENT = b"what a message holds"
TOO_MUCH = 1 << 60  # bytes: no disk has them, so that a pause lasts until the trace says that it is over
EVER_S = 10_000.0  # of a relay's operator
GRACE_S = 9.125  # of a relay's devices
STEP_S = 0.125  # the clock of a driver is turned by so much

Fate = tuple[tuple[str, ...], set[str], float | None]  # who was yielded, who was given up, when it was over


def settled(trace: Trace) -> Trace:
    """Return the trace as drivers meet it: of each device its first answer alone.

    Answers come at .25 of a second, late ones at .125, presence and pauses at .5, and deadlines end at .0 or .625:
    whatever a driver's own thread looks at meanwhile makes no difference.
    """
    first: dict[str, Event] = {}
    for one in trace.events_of(Answered, Failed):
        first.setdefault(one.device, one)
    events = [dataclasses.replace(one, at_s=one.at_s + 0.25) for one in first.values()]
    late = {one.device: one for one in reversed(trace.events_of(Late)) if one.device in trace.owed}
    events += [dataclasses.replace(one, at_s=one.at_s + 0.125) for one in late.values()]
    others = trace.events_of(Offline, Back, Paused, Resumed)
    events += [dataclasses.replace(one, at_s=one.at_s + 0.5) for one in others]
    terms = dataclasses.replace(trace.terms, offline_grace_s=trace.terms.offline_grace_s + 0.125)
    return Trace(trace.devices, terms, tuple(sorted(events, key=lambda one: one.at_s)), tuple(late))


def fate(trace: Trace) -> Fate:
    """Return what becomes of a trace by the exchange alone."""
    end = end_of(trace)
    return end.yielded, {device for device, _ in end.given_up}, end.closed_s


class Link(FakeLink):
    """Says when so many messages were sent."""

    def await_told(self, count: int) -> threading.Event:
        self.count, self.all_told = count, threading.Event()
        return self.all_told

    def send_job(self, device: str, message: object) -> None:
        super().send_job(device, message)
        if len(self.told) >= self.count:
            self.all_told.set()


class Cloud:
    """A cloud's rounds and relays on one home, which traces are played to."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.link, self.clock, self.number = folder, Link(), ManualClock(), 0
        self.storage, self.rounds, self.spool = Storage(folder, self.clock), OpenRounds(), Spool(folder / "spool")
        self.engine, self.blobs, key = open_database(folder / "cloud.db"), BlobStore(folder / "blobs"), new_fleet_key()
        self.jobs = Jobs(self.engine, self.blobs, lambda bundle: sign(bundle, key))
        job = self.jobs.submit("t:t", self.blobs.put(b"zip"), self.blobs.put_tree(PARAMETERS), (), JobConfig())
        self.row = self.jobs.load(job)
        with (folder / "spool" / "update").open("wb") as file:
            write_tree(PARAMETERS, file)
        deps = RelayDependencies(
            RelayRows(self.engine), self.rounds, self.spool, self.link, lambda bundle: sign(bundle, key),
            folder / "relays", self.storage,
        )  # fmt: skip
        self.relays = Relays(
            deps,
            RelayTiming(clock=self.clock, time_of_day=self.clock, device_s=GRACE_S, operator_s=EVER_S, stream_s=EVER_S),
        )

    def begin(self, trace: Trace) -> None:
        self.clock.now_s, self.number = 0.0, self.number + 1
        self.link.here, self.link.gone, self.link.told = set(trace.devices), set(), []
        self.told = self.link.await_told(len(trace.devices))

    def happen(self, event: Event) -> None:
        """Have presence or the disk be as the event says."""
        match event:
            case Offline():
                self.link.here.discard(event.device)
                (self.link.gone.add if event.was_seen else self.link.gone.discard)(event.device)
            case Back():
                self.link.here.add(event.device)
            case Paused():
                self.storage.refused(OSError(errno.ENOSPC, "full"), TOO_MUCH)
            case Resumed():
                self.storage.worked(TOO_MUCH)

    def play(self, trace: Trace, look: Callable[[], bool], answer: Callable[[Event], object]) -> float:
        """Let the trace happen, and time pass, until `look` says that it is over; returns when."""
        left = list(trace.events)
        while True:
            while left and left[0].at_s <= self.clock.now_s:
                event = left.pop(0)
                self.happen(event)
                if isinstance(event, Answered | Failed | Late):
                    answer(event)
                else:
                    look()
            if look():
                self.storage.worked(TOO_MUCH)
                return self.clock.now_s
            self.clock.advance(STEP_S)

    def round(self, trace: Trace) -> Fate:
        """Play a trace to a round of training, whose thread carries out what its exchange says."""
        self.begin(trace)
        config = RoundsConfig(quorum=trace.terms.quorum, offline_grace_s=trace.terms.offline_grace_s)
        row = dataclasses.replace(self.row, config=JobConfig(rounds=config))
        deps = FleetDependencies(self.rounds, self.jobs, self.blobs, self.spool, self.link, self.storage, self.clock)
        plan = Plan(
            job=self.row.id, round=self.number, parameters=PARAMETERS, clients=trace.devices,
            train=row.config.train, deadline_s=trace.terms.deadline_s, owed=trace.owed,
        )  # fmt: skip
        fleet, came = GrpcFleet(row, deps), list[str]()
        thread = threading.Thread(
            target=lambda: came.extend(named(one.device, late=one.round < plan.round) for one in fleet.collect(plan)),
            name="job",
        )
        thread.start()
        assert self.told.wait(10)
        opened = self.rounds.get(plan.job, plan.round)

        def look() -> bool:
            opened.note(Presence.of(self.link))
            opened.look()
            return not opened.waiting()

        def answer(event: Event) -> None:
            file, late = None if isinstance(event, Failed) else "update", isinstance(event, Late)
            opened.accept(AnswerRow(device=event.device, file=file, reason="no data", late=late), lambda _answer: None)

        end_s = self.play(trace, look, answer)
        thread.join(10)
        assert not thread.is_alive()
        told = [(device, one.round) for device, one in self.link.told if isinstance(one, RoundClosed)]
        closed = {device for device, number in told if number == plan.round}
        unheard = {device for device in trace.owed if named(device, late=True) not in came}
        assert {device for device, number in told if number == plan.round - 1} == unheard
        return tuple(came), closed, end_s

    def messages(self, trace: Trace) -> tuple[Fate, set[str]]:
        """Play a trace to a relay's messages, one to each device."""
        self.begin(trace)
        relay = self.relays.start("app:app", BlobRef(sha256="0" * 64, size=1))
        self.relays.contents(relay).put(CONTENT)
        sha256 = hashlib.sha256(CONTENT).hexdigest()
        self.relays.send(
            relay,
            [
                RelayMessage(number=number, device=device, envelope="e", content_sha256=sha256,
                        expires_s=trace.terms.deadline_s)
                for number, device in enumerate(trace.devices, 1)
            ],
        )  # fmt: skip
        lines, seen = self.relays.lines(relay, 0.0), list[dict[str, Any]]()

        def look() -> bool:
            self.relays.look()
            while len(seen) < len(trace.devices) and "heartbeat" not in (line := next(lines)):
                seen.append(line)
            return len(seen) == len(trace.devices)

        def answer(event: Event) -> None:
            opened = self.rounds.get(relay, trace.devices.index(event.device) + 1)
            if opened is not None:
                opened.accept(AnswerRow(device=event.device, reason="no flower here"), opened.record)

        end_s = self.play(trace, look, answer)
        self.relays.end(relay, "done")
        lost = {line["device"]: line["reason"] for line in seen if line["lost"]}
        return (tuple(line["device"] for line in seen if not line["lost"]), set(lost), end_s), set(lost.values())


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    one = Cloud(tmp_path_factory.mktemp("cloud"))
    yield one
    one.engine.dispose()


def in_virtual_time(trace: Trace) -> Fate:
    """Play a trace to the virtual clock, whose schedule it is."""
    answers = {one.device: one for one in trace.events_of(Answered, Failed)}

    class Inner:
        def clients(self) -> list[str]:
            raise AssertionError

        def collect(self, plan: Plan) -> Iterator[Update | Failure]:
            for client in plan.clients:
                if plan.round == 1 or isinstance(answers[client], Answered):
                    yield make_update(client, job=plan.job, round=plan.round, w=[1.0, 1.0])
                else:
                    yield Failure(job=plan.job, round=plan.round, device=client, reason="no data")

        def traffic(self) -> Traffic:
            return Traffic()

    clock = virtual.VirtualClock()
    rounds = RoundsConfig(quorum=trace.terms.quorum, offline_grace_s=trace.terms.offline_grace_s)
    schedule = Schedule(
        end_s=math.inf, arrivals={one.device: one.at_s for one in answers.values()}, late=(), lost={},
        refused={},
    )  # fmt: skip
    fleet = virtual.VirtualFleet(Inner(), None, clock, rounds=rounds, num_samples=len)
    plan = Plan(
        job="job", round=2, parameters=PARAMETERS, clients=trace.devices, train=JobConfig().train,
        deadline_s=trace.terms.deadline_s, owed=trace.owed,
    )  # fmt: skip
    before = dataclasses.replace(plan, round=1, owed=())
    fleet._at_work = {one.device: virtual._AtWork(before, one.at_s) for one in trace.events_of(Late)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(virtual, "make_schedule", lambda *_, **__: schedule)
        patch.setattr(virtual, "presence_in", lambda *_: trace.events_of(Offline, Back, Paused, Resumed))
        came = tuple(named(one.device, late=one.round < plan.round) for one in fleet.collect(plan))
    return came, set(trace.devices) - set(came), clock()


FAILED_AND_GONE = Trace(  # a failure makes no quorum: the other is waited for until the deadline
    ("client-0", "client-1"), Terms(deadline_s=50.0, offline_grace_s=5.0, quorum=1),
    (Failed("client-0", at_s=1.0), Offline("client-1", at_s=2.0)),
)  # fmt: skip


@settings(law, max_examples=60)
@example(FAILED_AND_GONE)
@given(traces(quorums=(1, 4)))
def test_a_cohort_ends_in_the_cloud_as_in_virtual_time(cloud: Cloud, drawn: Trace) -> None:
    trace = settled(drawn)
    assert cloud.round(trace) == in_virtual_time(trace) == fate(trace)


@settings(law, max_examples=60)
@given(traces(quorums=(1, 4), late=True))
def test_an_update_of_the_round_before_is_taken_in_the_cloud_as_in_virtual_time(cloud: Cloud, drawn: Trace) -> None:
    trace = settled(drawn)
    assert cloud.round(trace) == in_virtual_time(trace) == fate(trace)


@settings(law, max_examples=60)
@given(traces(max_devices=1))
def test_one_device_beside_a_quorum_ends_as_a_message_does(cloud: Cloud, drawn: Trace) -> None:
    alone = settled(drawn)
    quorum = Terms(deadline_s=alone.terms.deadline_s, offline_grace_s=GRACE_S, quorum=1)
    trace = Trace((*alone.devices, "other"), quorum, (Answered("other", at_s=0.0), *alone.events))
    message, reasons = cloud.messages(trace)
    assert message == cloud.round(trace) == in_virtual_time(trace) == fate(trace)
    said = {GiveUpReason.LATE: "no reply in time", GiveUpReason.OFFLINE: f"offline for {GRACE_S:g} s"}
    assert reasons == {f"device {device}: {said[why]}" for device, why in end_of(trace).given_up}
