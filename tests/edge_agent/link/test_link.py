"""The link: presence, plans and wishes over a real broker, and gRPC beside it, each without the other."""

from __future__ import annotations

import asyncio
import time

import pytest

from edge_agent.link import link as link_module
from edge_agent.link.channel import CloudChannel
from edge_agent.link.chooser import ParentChooser, ParentRules
from edge_agent.link.lease import LeasePolicy
from edge_agent.link.link import CloudLink, _Session
from edge_agent.link.parents import KnownParents
from edge_agent.link.profile import load_profile
from edgefl.errors import HomeError
from edgefl.protocols import messages, tls, topics
from edgefl.protocols.messages import DeviceState, RolloutNote, RoundClosed, Telemetry


class CloudLinkCallbacks:
    """Records the calls of the link's callbacks."""

    def __init__(self) -> None:
        self.jobs, self.desired, self.nexts, self.ended = [], [], [], []

    def on_job(self, message):
        self.jobs.append(message)

    def on_desired(self, signed):
        self.desired.append(signed)

    def before_next(self):
        return ["job-held"], lambda plans, ended: (self.nexts.append(plans), self.ended.extend(ended))


@pytest.fixture
def with_link(fleet, tmp_path):
    """Run a coroutine function with a link and its callbacks; `broker_port` 1 = a broker that is not there."""

    def run(function, broker_port=1):
        home = fleet.enrol(tmp_path / "agent", broker_port=broker_port)

        async def inside():
            profile = load_profile(home)
            callbacks = CloudLinkCallbacks()
            known = KnownParents(home, profile, fleet.key.public_key())
            chooser = ParentChooser(home, known, ParentRules(policy=LeasePolicy(lease_s=0.5)))
            link = CloudLink(home, chooser, CloudChannel(profile, home), callbacks)
            running = asyncio.create_task(link.run())
            try:
                async with asyncio.timeout(30):
                    await function(link, callbacks)
            finally:
                running.cancel()
                [ended] = await asyncio.gather(running, return_exceptions=True)
                assert isinstance(ended, asyncio.CancelledError), ended

        asyncio.run(inside())
        return home

    return run


@pytest.fixture
def shared_ca(fleet_ca, fleet):
    """Let the broker's CA be the fleet's."""
    for name in ("ca.key", "ca.pem", "key.pem", "cert.pem"):
        (fleet.folder / name).write_bytes((fleet_ca.folder / name).read_bytes())
    fleet.stop()
    fleet.start()


def states(cloud, count):
    """Return the next states that the cloud hears."""
    return [messages.decode(DeviceState, cloud.next(10)[1]) for _ in range(count)]


def test_without_a_broker_next_brings_everything(fleet, with_link, until):
    plan = fleet.plan(1)
    wish = fleet.release(b"onnx", 1, sequence=1)
    fleet.desired.append(wish)

    async def run(_link, callbacks):
        await until(lambda: callbacks.nexts and callbacks.desired)
        assert callbacks.nexts[0] == [plan]
        assert callbacks.desired == [wish]

    home = with_link(run)
    assert time.time() - (home / "contact").stat().st_mtime < 10


def test_next_is_asked_again_when_the_cloud_is_back(fleet, with_link, until):
    async def run(_link, callbacks):
        await until(lambda: callbacks.nexts)
        await asyncio.to_thread(fleet.stop)
        fleet.plan(1)
        await asyncio.to_thread(fleet.start)
        await until(lambda: callbacks.nexts[-1])

    with_link(run)


def test_now_and_then_next_is_asked_anyway(with_link, monkeypatch, until):
    monkeypatch.setattr(link_module, "ASK_EVERY_S", 0.05)

    async def run(_link, callbacks):
        await until(lambda: len(callbacks.nexts) > 4)

    with_link(run)


def test_a_next_that_cannot_be_read_is_survived(fleet, with_link, monkeypatch, until):
    monkeypatch.setattr(link_module, "ASK_EVERY_S", 0.05)
    fleet.broker = "not a broker"

    async def run(_link, callbacks):
        await until(lambda: len(callbacks.nexts) > 2)

    with_link(run)


def test_presence_plans_and_telemetry_over_the_broker(fleet, shared_ca, broker, peer, with_link, until):
    cloud = peer("cloud", topics.up("cam-1", "state"))
    closed = RoundClosed(job="j", round=1, job_ended=False)
    plan = fleet.plan(1, offer=False)
    wish = fleet.release(b"onnx", 1, sequence=1)

    async def run(link, callbacks):
        [birth] = await asyncio.to_thread(states, cloud, 1)
        assert (birth.online, birth.models, birth.tags) == (True, {}, {"site": "test"})
        for message in (plan, closed):
            cloud.link.publish(topics.down("cam-1", "job"), messages.encode(message))
        cloud.link.publish(topics.down("cam-1", "job"), b"nonsense")
        cloud.link.publish(topics.down("cam-1", "desired"), messages.encode(wish), retain=True)
        cloud.link.publish(topics.down("cam-1", "desired"), b"", retain=True)
        await until(lambda: len(callbacks.jobs) == 2 and callbacks.desired)
        assert callbacks.jobs == [plan, closed]
        assert callbacks.desired == [wish]
        link.serve({"digits": 3}, "http://127.0.0.1:8000")
        [serving] = await asyncio.to_thread(states, cloud, 1)
        assert (serving.session, serving.models, serving.serving_url) == (
            birth.session, {"digits": 3}, "http://127.0.0.1:8000",
        )  # fmt: skip

    with_link(run, broker.port)
    [goodbye] = states(cloud, 1)
    assert not goodbye.online


def test_notes_and_telemetry_have_their_topics(shared_ca, broker, peer, with_link, until):
    cloud = peer("cloud", topics.up("cam-1", "rollout"), topics.up("cam-1", "telemetry"))
    note = RolloutNote(model="digits", version=1, state="active")

    async def run(link, callbacks):
        await until(lambda: len(callbacks.nexts) > 1)  # once for each connection
        link.report(note)
        link._publish("telemetry", link_module.measure(link._home), qos=0)
        heard = dict([await asyncio.to_thread(cloud.next, 10) for _ in range(2)])
        assert messages.decode(RolloutNote, heard[topics.up("cam-1", "rollout")]) == note
        assert messages.decode(Telemetry, heard[topics.up("cam-1", "telemetry")]).ram_total_mb > 100

    with_link(run, broker.port)


def test_a_broker_that_restarts_gets_a_higher_session(shared_ca, broker, with_link, until):
    async def run(_link, callbacks):
        await until(lambda: len(callbacks.nexts) > 1)
        asked = len(callbacks.nexts)
        await asyncio.to_thread(broker.stop)
        await asyncio.to_thread(broker.start)
        await until(lambda: len(callbacks.nexts) > asked)  # it asks what it may have missed

    home = with_link(run, broker.port)
    assert int((home / "session").read_text()) > 1_600_000_000_000


def test_a_broker_that_moved_is_followed(fleet, shared_ca, broker, peer, with_link):
    cloud = peer("cloud", topics.up("cam-1", "state"))
    fleet.broker = f"mqtts://:{broker.port}"

    async def run(_link, _callbacks):
        [birth] = await asyncio.to_thread(states, cloud, 1)
        assert birth.online

    home = with_link(run)
    assert load_profile(home).broker == broker.url


def test_a_session_only_rises(tmp_path):
    path = tmp_path / "session"
    path.write_text("9999999999999")  # the clock was ahead once
    session = _Session(path)
    session.advance()
    assert session.number == 10_000_000_000_000
    assert _Session(path).number == 10_000_000_000_000
    path.write_text("damaged")
    assert _Session(path).number == 0


def test_a_certificate_is_renewed_when_the_cloud_says_so_and_nothing_is_lost(
    with_link, fleet, shared_ca, broker, peer, until
):
    cloud = peer("cloud", topics.EVERY_UP)

    async def run(link, _callbacks):
        await until(lambda: fleet.serials and link._mqtt.is_up)
        first, fleet.is_due = fleet.serials[0], True
        link._ask.set()
        await until(lambda: fleet.serials[-1] != first)  # the new certificate's first use
        link.report(RolloutNote(model="m", version=1, state="active"))
        while (await asyncio.to_thread(cloud.next, 10))[0] != topics.up("cam-1", "rollout"):
            pass

    home = with_link(run, broker_port=broker.port)
    assert tls.serial_number((home / "cert.pem").read_bytes()) == fleet.serials[-1]


@pytest.mark.parametrize("broker", ["mqtts://[::1", "mqtts://b:99999", "mqtts://b:port", "mqtts://\x1b[2J:1", "\0"])
def test_no_broker_that_the_cloud_names_ends_the_link(fleet, with_link, monkeypatch, until, broker):
    monkeypatch.setattr(link_module, "ASK_EVERY_S", 0.05)
    fleet.broker = broker

    async def run(_link, callbacks):
        await until(lambda: len(callbacks.nexts) > 2)

    with_link(run)


def test_a_database_that_is_locked_for_a_while_puts_next_off(fleet, with_link, monkeypatch, until):
    monkeypatch.setattr(link_module, "RETRY_S", 0.01)
    faults = [HomeError("locked"), OSError(28, "full")]

    async def run(_link, callbacks):
        before = callbacks.before_next

        def before_next():
            if faults:
                raise faults.pop()
            return before()

        monkeypatch.setattr(callbacks, "before_next", before_next)
        await until(lambda: callbacks.nexts and not faults)

    with_link(run)


@pytest.mark.parametrize("saved", ["9" * 5000, str(10**22), "-5", "", "\xff", "x"])
def test_a_damaged_session_number_is_begun_anew(tmp_path, saved):
    path = tmp_path / "session"
    path.write_bytes(saved.encode("latin-1"))
    session = _Session(path)
    session.advance()
    assert 0 < session.number < 2**62


def test_a_cloud_that_turns_this_device_away_is_a_line_once(with_link, fleet, monkeypatch, until, caplog):
    monkeypatch.setattr(link_module, "RETRY_S", 0.02)
    fleet.turned_away = "removed"

    async def run(_link, _callbacks):
        await until(lambda: len(fleet.calls) > 5)

    with_link(run)
    lines = [record for record in caplog.records if "next.failed" in record.message and record.levelname == "WARNING"]
    assert len(lines) == 1
