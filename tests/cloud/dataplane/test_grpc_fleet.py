"""A job's fleet over a real broker: who is waited for, for how long, and what a restart finds."""

import errno
import queue
import threading

import numpy as np
import pytest

from cloud.broker.link import DeviceLinkCallbacks
from cloud.dataplane.grpc_fleet import FleetDependencies, GrpcFleet
from cloud.dataplane.open_round import Presence
from cloud.dataplane.open_rounds import OpenRounds
from cloud.jobs.answers import AnswerRow
from cloud.state.blobs import BlobStore
from cloud.state.enrolment import REMOVED
from cloud.state.jobs import Jobs
from cloud.state.spool import Spool
from cloud.state.storage import Storage
from cloud.state.store import open_database
from edgefl.config import JobConfig, RoundsConfig, TrainConfig
from edgefl.errors import CloudStopping, JobCancelled
from edgefl.protocols import topics
from edgefl.protocols.manifest import new_fleet_key, sign
from edgefl.protocols.messages import DeviceState, Evaluate, Fit, RoundClosed, UpdateRefused, decode_job, encode
from edgefl.protocols.mqtt import LinkConfig
from edgefl.records import DeviceEvaluation, Evaluated, Failure, Plan
from edgefl.settings.server import ServerConfig
from edgefl.testing import ManualClock, make_update
from edgefl.trees import SpooledTree, write_tree
from tests.threaded import Broker, Link, ThreadedDeviceLink

PARAMETERS = {"w": np.zeros(2, np.float32)}


class Device:
    """A device's MQTT side: it says that it is there, and hears."""

    def __init__(self, broker, identity, name):
        self.name, self.heard = name, queue.Queue()
        config = LinkConfig(
            url=broker.url, client_id=name, identity=identity, subscriptions=[(topics.down(name, "job"), 1)]
        )
        self.link = Link(
            config, on_failure=pytest.fail, on_message=lambda _topic, payload: self.heard.put(decode_job(payload))
        )
        self.link.start()
        assert self.link.wait_connected(5)
        self.say(online=True)

    def say(self, *, online, session=1):
        state = DeviceState(session=session, online=online, agent_version="0")
        self.link.publish(topics.up(self.name, "state"), encode(state), retain=True)

    def next(self):
        return self.heard.get(timeout=5)


class Centre:
    def __init__(self, folder, ca, port):
        self.broker = Broker(ca.cloud, "127.0.0.1", port)
        self.broker.start()
        self.engine = open_database(folder / "cloud.db")
        self.blobs, self.spool, self.rounds = BlobStore(folder / "blobs"), Spool(folder / "spool"), OpenRounds()
        key = new_fleet_key()
        self.jobs = Jobs(self.engine, self.blobs, lambda bundle: sign(bundle, key))
        callbacks = DeviceLinkCallbacks(on_failure=pytest.fail, on_state=lambda _device, _state: self.rounds.wake())
        self.link = ThreadedDeviceLink(self.broker.url, ca.cloud, callbacks)
        self.link.start()
        assert self.link.wait_connected(5)
        self.devices = {name: Device(self.broker, ca.device(name), name) for name in ("a", "b")}
        assert self.link.wait_until(lambda: self.link.online() == {"a", "b"}, 5)

    def fleet(self, clock=None, storage=None, server=None, **rounds):
        parameters = self.blobs.put_tree(PARAMETERS)
        config = JobConfig(rounds=RoundsConfig(**rounds), server=server or ServerConfig())
        self.job = self.jobs.submit("t:t", self.blobs.put(b"zip"), parameters, (), config)
        clock = clock or ManualClock()
        storage = storage or Storage(None, clock)
        deps = FleetDependencies(self.rounds, self.jobs, self.blobs, self.spool, self.link, storage, clock)
        return GrpcFleet(self.jobs.load(self.job), deps)

    def plan(self, **changes):
        facts = {
            "job": self.job, "round": 1, "parameters": PARAMETERS, "clients": ("a", "b"), "train": JobConfig().train,
            "deadline_s": 20.0,
        }  # fmt: skip
        return Plan(**facts | changes)

    def answer(self, device, value=1.0):
        """What the gRPC service does when an update has come."""
        path = self.spool.file(self.job, 1, device)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            write_tree({"w": np.full(2, value, np.float32)}, file)
        answer = AnswerRow(device=device, file=f"{self.job}/1/{device}", weight=1.0)
        opened = self.rounds.get(self.job, 1)
        return opened.accept(answer, lambda one: self.jobs.record(self.job, 1, one))

    def close(self):
        for device in self.devices.values():
            device.link.close(0.2)
        self.link.close()
        self.broker.stop()
        self.engine.dispose()


@pytest.fixture
def centre(tmp_path, fleet_ca, free_port):
    centre = Centre(tmp_path, fleet_ca, free_port)
    yield centre
    centre.close()


def in_thread(function):
    """Run a fleet's iterator where it runs in production: in a thread of its own."""
    results = queue.Queue()
    thread = threading.Thread(target=lambda: results.put(list(function())), name="job")
    thread.start()
    return lambda: (thread.join(20), results.get(timeout=5))[1]


def test_a_round_announces_collects_and_closes(centre):
    fleet = centre.fleet(quorum=2)
    assert fleet.clients() == ["a", "b"]
    collected = in_thread(lambda: fleet.collect(centre.plan()))
    plan = centre.devices["a"].next()
    assert isinstance(plan, Fit)
    assert SpooledTree(centre.blobs.path(plan.model.sha256))["w"].tolist() == [0, 0]
    assert plan == centre.devices["b"].next()
    assert centre.answer("a", 2.0)
    opened = centre.rounds.get(centre.job, 1)
    opened.accept(AnswerRow(device="b", reason="task raised"), lambda _answer: None)
    first, second = collected()
    assert first.tree["w"].tolist() == [2, 2]
    assert second == Failure(job=centre.job, round=1, device="b", reason="task raised")
    assert centre.rounds.get(centre.job, 1) is None


def test_an_update_of_a_removed_device_that_waits_to_be_folded_is_refused(centre):
    fleet = centre.fleet(quorum=1)
    arriving = fleet.collect(centre.plan(clients=("a", "b", "c")))
    opening = in_thread(lambda: [next(arriving)])
    centre.devices["a"].next()
    centre.answer("a")
    opening()  # a is folded; b and c are not
    centre.answer("b")
    opened = centre.rounds.get(centre.job, 1)
    for device in "abc":
        opened.forget(device, lambda one: centre.jobs.record(centre.job, 1, one))
    assert list(arriving) == [Failure(job=centre.job, round=1, device=name, reason=REMOVED) for name in "bc"]


def test_once_the_quorum_answered_an_offline_device_is_not_waited_for(centre):
    clock = ManualClock()
    fleet = centre.fleet(clock, quorum=1, offline_grace_s=5.0)
    arriving = fleet.collect(centre.plan(deadline_s=1000))
    opening = in_thread(lambda: [next(arriving)])
    centre.devices["a"].next()
    centre.devices["b"].say(online=False)
    opened = centre.rounds.get(centre.job, 1)
    assert centre.link.wait_until(lambda: "b" in centre.link.offline(), 5)
    centre.answer("a")
    opening()
    opened.note(Presence.of(centre.link))
    clock.advance(5.0)
    assert list(arriving) == []
    assert isinstance(centre.devices["b"].next(), Fit)
    assert centre.devices["b"].next() == RoundClosed(job=centre.job, round=1, job_ended=False)


def test_a_device_that_comes_or_goes_is_heard_of_while_answers_are_waited_for(centre, monkeypatch):
    clock = ManualClock()
    fleet = centre.fleet(clock, quorum=1, offline_grace_s=5.0)
    collected = in_thread(lambda: fleet.collect(centre.plan(deadline_s=1000)))
    centre.devices["a"].next()
    opened = centre.rounds.get(centre.job, 1)
    note, notes = opened.note, queue.Queue()
    monkeypatch.setattr(opened, "note", lambda presence: notes.put(note(presence)))
    centre.answer("a")
    centre.devices["b"].say(online=False)
    while opened.wait_s() > 5.0:
        notes.get(timeout=5)  # by the round's own thread
    clock.advance(5.0)
    opened.look()
    assert [answer.device for answer in collected()] == ["a"]


def test_a_round_ends_at_its_deadline(centre):
    clock = ManualClock()
    fleet = centre.fleet(clock, quorum=2)
    collected = in_thread(lambda: fleet.collect(centre.plan(deadline_s=20.0)))
    centre.devices["a"].next()
    opened = centre.rounds.get(centre.job, 1)
    clock.advance(19.9)
    opened.look()
    assert opened.waiting() == {"a", "b"}
    clock.advance(0.1)
    opened.look()
    assert collected() == []
    assert centre.devices["a"].next() == RoundClosed(job=centre.job, round=1, job_ended=False)


def test_a_restart_yields_what_had_come_and_asks_only_the_others(centre):
    fleet = centre.fleet(quorum=2)
    centre.jobs.open_round(centre.job, 1, ("a", "b"))
    path = centre.spool.file(centre.job, 1, "a")
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        write_tree({"w": np.full(2, 5.0, np.float32)}, file)
    centre.jobs.record(centre.job, 1, AnswerRow(device="a", file=f"{centre.job}/1/a", weight=3.0))
    collected = in_thread(lambda: fleet.collect(centre.plan()))
    assert isinstance(centre.devices["b"].next(), Fit)
    centre.answer("b")
    first, second = collected()
    assert (first.device, first.weight, first.tree["w"].tolist()) == ("a", 3.0, [5, 5])
    assert second.device == "b"
    assert centre.devices["a"].heard.empty()


def test_a_cancelled_job_stops_in_mid_round(centre):
    fleet = centre.fleet(quorum=2)
    arriving = fleet.collect(centre.plan())
    opening = in_thread(lambda: [next(arriving)])
    centre.devices["a"].next()
    centre.answer("a")
    opening()
    centre.rounds.interrupt(JobCancelled("stop"), centre.job)
    with pytest.raises(JobCancelled, match="stop"):
        next(arriving)
    assert centre.rounds.get(centre.job, 1) is None


def test_a_refused_device_and_an_ended_job_are_told(centre):
    fleet = centre.fleet(quorum=1)
    fleet.refuse(centre.plan(), make_update("a", w=[1.0]), "tensor 'w' holds NaN")
    assert centre.devices["a"].next() == UpdateRefused(job=centre.job, round=1, reason="tensor 'w' holds NaN")
    arriving = fleet.collect(centre.plan())
    opening = in_thread(lambda: [next(arriving)])
    centre.devices["a"].next()
    centre.answer("a")
    opening()
    arriving.close()  # enough have answered
    fleet.end()
    heard = [centre.devices["b"].next() for _ in range(3)]
    assert [getattr(one, "job_ended", None) for one in heard] == [None, False, True]


def test_too_few_devices_are_waited_for_only_so_long(centre, monkeypatch):
    waits_s = []
    monkeypatch.setattr(centre.link, "wait_until", lambda is_there, wait_s: waits_s.append(wait_s) or is_there())
    fleet = centre.fleet(clients=3, quorum=3, wait_s=60.0)
    assert fleet.clients() == ["a", "b"]
    assert waits_s == [60.0, 0.0]


def test_a_job_that_waits_for_devices_is_cancelled_at_once(centre, monkeypatch):
    fleet, waits, wait_until = centre.fleet(quorum=3, wait_s=3600), threading.Event(), centre.link.wait_until

    def wait(is_there, wait_s):
        return wait_until(lambda: waits.set() or is_there(), wait_s)

    monkeypatch.setattr(centre.link, "wait_until", wait)

    def cancelled():
        with pytest.raises(JobCancelled, match="stop"):
            fleet.clients()
        return ["cancelled"]

    waiting = in_thread(cancelled)
    assert waits.wait(10)
    centre.rounds.interrupt(JobCancelled("stop"), centre.job)
    centre.link.wake()
    assert waiting() == ["cancelled"]


def test_a_stopping_cloud_tells_no_device_that_its_round_is_closed(centre):
    fleet = centre.fleet(quorum=2)
    arriving = fleet.collect(centre.plan())
    opening = in_thread(lambda: [next(arriving)])
    assert isinstance(centre.devices["a"].next(), Fit)
    centre.answer("b")
    opening()
    centre.rounds.interrupt(CloudStopping("end"))
    with pytest.raises(CloudStopping):
        next(arriving)
    fleet.refuse(centre.plan(), make_update("a", w=[1.0]), "said after what was not to be said")
    assert isinstance(centre.devices["a"].next(), UpdateRefused)


def test_a_device_that_went_before_the_round_began_is_not_waited_for(centre):
    clock = ManualClock()
    fleet = centre.fleet(clock, quorum=1, offline_grace_s=5.0)
    centre.devices["b"].say(online=False)
    assert centre.link.wait_until(lambda: "b" in centre.link.offline(), 5)
    arriving = fleet.collect(centre.plan(clients=("a", "b", "unheard"), deadline_s=1000))
    opening = in_thread(lambda: [next(arriving)])
    centre.devices["a"].next()
    centre.answer("a")
    opening()
    opened = centre.rounds.get(centre.job, 1)
    assert opened.wait_s() == 25.0  # one was not heard of since the cloud's start, and may be on its way back
    clock.advance(25.0)
    assert list(arriving) == []


def test_after_a_pause_the_plan_is_told_again(centre, tmp_path):
    clock = ManualClock()
    storage = Storage(None, clock)
    fleet = centre.fleet(clock, storage, quorum=2)
    collected = in_thread(lambda: fleet.collect(centre.plan(deadline_s=20.0)))
    plan = centre.devices["a"].next()
    centre.answer("b")
    storage.refused(OSError(errno.ENOSPC, "full"))
    clock.advance(500.0)
    storage.worked()
    centre.rounds.wake()
    assert centre.devices["a"].next() == plan
    assert centre.answer("a")
    assert [answer.device for answer in collected()] == ["b", "a"]


def test_an_evaluation_without_training_is_an_assignment_of_its_own(centre):
    fleet = centre.fleet(quorum=1)
    centre.rounds.note_kinds("b", ["fit", "deliver"])  # an older agent
    plan = centre.plan(fit=False, evaluate=True, train=TrainConfig(workers=3))
    collected = in_thread(lambda: fleet.collect(plan))
    asked = centre.devices["a"].next()
    assert isinstance(asked, Evaluate)
    assert (asked.seed, asked.workers, asked.max_update_bytes) == (JobConfig().train.seed, 3, 64 << 10)
    assert SpooledTree(centre.blobs.path(asked.model.sha256))["w"].tolist() == [0, 0]
    found = DeviceEvaluation(metrics={"accuracy": 0.5}, weight=4.0)
    answer = AnswerRow(device="a", file="none", evaluation=found)
    centre.rounds.get(centre.job, 1).accept(answer, lambda one: centre.jobs.record(centre.job, 1, one))
    older, evaluated = collected()
    assert older.reason.startswith("its agent does not know assignments of the kind 'evaluate'; update the agent")
    assert evaluated == Evaluated(job=centre.job, round=1, device="a", evaluation=found)


def test_a_round_asks_for_evaluations_as_its_plan_says(centre):
    fleet = centre.fleet(quorum=1)
    collected = in_thread(lambda: fleet.collect(centre.plan(evaluate=True, clients=("a",))))
    assert centre.devices["a"].next().evaluate
    centre.answer("a")
    [update] = collected()
    assert update.evaluation is None


def test_the_window_after_the_quorum_ends_a_round_and_who_is_missing_is_told(centre):
    clock, came, settled = ManualClock(), queue.Queue(), threading.Event()
    fleet = centre.fleet(clock, quorum=1, grace=3.0)

    def collect():
        for one in fleet.collect(centre.plan()):
            came.put(one.device)
        came.put("over")

    job = threading.Thread(target=collect)
    job.start()
    for one in "ab":
        centre.devices[one].next()
    opened = centre.rounds.get(centre.job, 1)
    settle = opened.settle
    opened.settle = lambda devices, *, admitted: settle(devices, admitted=admitted) or settled.set()
    clock.advance(1.0)
    assert centre.answer("a")
    assert came.get(timeout=10) == "a"
    assert settled.wait(10)  # the guard has admitted it
    assert opened.wait_s() == 3.0
    clock.advance(3.5)
    opened.look()
    assert came.get(timeout=10) == "over"
    job.join(10)
    assert isinstance(centre.devices["b"].next(), RoundClosed)


def test_a_refused_answer_does_not_begin_the_window(centre):
    fleet = centre.fleet(quorum=1, grace=0.0)
    plan, came = centre.plan(), []

    def collect():
        for one in fleet.collect(plan):
            came.append(one.device)
            if one.device == "a":
                fleet.refuse(plan, one, "tensor 'w' holds NaN")

    job = threading.Thread(target=collect)
    job.start()
    for one in "ab":
        centre.devices[one].next()
    assert centre.answer("a")
    assert isinstance(centre.devices["a"].next(), UpdateRefused)
    assert centre.answer("b")
    job.join(10)
    assert came == ["a", "b"]
