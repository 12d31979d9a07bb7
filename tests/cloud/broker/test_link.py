"""The cloud's link: presence by session epochs, bad messages without effect, small messages out."""

from __future__ import annotations

import dataclasses
import logging
import queue
import sqlite3
import subprocess
import sys
import threading

import pytest
import sqlalchemy as sa

from cloud.broker.link import DeviceLink, DeviceLinkCallbacks
from edgefl.errors import ProtocolError
from edgefl.protocols import topics
from edgefl.protocols.messages import (
    MAX_MESSAGE_BYTES,
    DeviceState,
    RolloutNote,
    RoundClosed,
    Signed,
    Telemetry,
    decode,
    decode_job,
    encode,
)
from tests.threaded import ThreadedDeviceLink

NOTE = RolloutNote(model="digits", version=2, state="active")
TELEMETRY = Telemetry(
    cpu_count=4, cpu_percent=1.0, load_1m=0.5, ram_total_mb=8.0, ram_available_mb=4.0, disk_free_mb=9.0
)


def state(session: int, *, online: bool = True) -> bytes:
    return encode(DeviceState(session=session, online=online, agent_version="1"))


@dataclasses.dataclass
class Received:
    link: DeviceLink
    states: queue.Queue
    notes: queue.Queue
    known: set


@pytest.fixture
def cloud(broker, fleet_ca):
    states, notes = queue.Queue(), queue.Queue()
    known = {"cam-1", "cam-2"}
    callbacks = DeviceLinkCallbacks(
        on_failure=pytest.fail,
        on_state=lambda *one: states.put(one),
        on_note=lambda *one: notes.put(one),
        is_known=known.__contains__,
    )
    link = ThreadedDeviceLink(broker.url, fleet_ca.cloud, callbacks)
    link.start()
    assert link.wait_connected(5)
    yield Received(link, states, notes, known)
    link.close()


def online_is(link: DeviceLink, *names: str, timeout_s: float = 5.0) -> bool:
    return link.wait_until(lambda: link.online() == set(names), timeout_s)


def test_presence_rules_by_hand(cloud, peer) -> None:
    """(session, online) as it arrives -> whether the device counts as online after it."""
    device, topic = peer("cam-1"), topics.up("cam-1", "state")
    story = [
        ((5, True), True),
        ((5, False), False),  # the will of this session
        ((5, True), False),  # a repeated birth of a session that has ended
        ((7, True), True),
        ((5, False), True),  # the will of a former session, late
        ((7, True), True),  # news within the session
    ]
    for (session, online), counts in story:
        device.link.publish(topic, state(session, online=online))
        device.link.publish(topics.up("cam-1", "rollout"), encode(NOTE))
        assert cloud.notes.get(timeout=5) == ("cam-1", NOTE)  # what came before has been taken
        assert ("cam-1" in cloud.link.online()) == counts
        assert ("cam-1" in cloud.link.offline()) != counts
    heard = [cloud.states.get_nowait()[1] for _ in range(cloud.states.qsize())]
    assert [(one.session, one.online) for one in heard] == [(5, True), (5, False), (7, True), (7, True)]


def test_a_device_of_a_lost_region_is_neither_online_nor_offline(cloud) -> None:
    link = cloud.link

    def hear(region, payload):
        link.hear(region, "cam-1", "state", payload)
        return cloud.states.get(timeout=20)[1].online

    assert hear("r1", state(1))
    assert hear("r1", b"") is False
    assert (link.online(), link.offline()) == (frozenset(), frozenset())
    assert hear("r2", state(2))
    assert (link.online(), link.via("cam-1")) == ({"cam-1"}, "r2")
    assert hear("r2", state(2, online=False)) is False  # now it says so itself
    assert link.offline() == {"cam-1"}


def test_each_kind_is_heard_with_its_device(cloud, peer) -> None:
    device = peer("cam-1")
    device.link.publish(topics.up("cam-1", "state"), state(1))
    assert cloud.states.get(timeout=5)[0] == "cam-1"
    assert cloud.link.state("cam-1") == decode(DeviceState, state(1))
    assert cloud.link.state("cam-2") is None


def test_what_a_device_measured_last_is_kept_while_it_is_online(cloud, peer) -> None:
    """(what comes, what is known after it); a note tells that what came before it has been taken."""
    device = peer("cam-1")
    later = dataclasses.replace(TELEMETRY, cpu_percent=99.0)
    story = [
        ("telemetry", encode(TELEMETRY), None),  # of a device of which nobody knows that it is there
        ("state", state(1), None),
        ("telemetry", encode(TELEMETRY), TELEMETRY),
        ("telemetry", encode(later), later),
        ("telemetry", encode(NOTE), later),
        ("state", state(1, online=False), None),
        ("telemetry", encode(TELEMETRY), None),
    ]
    for kind, payload, known in story:
        device.link.publish(topics.up("cam-1", kind), payload, qos=1)
        device.link.publish(topics.up("cam-1", "rollout"), encode(NOTE))
        assert cloud.notes.get(timeout=5) == ("cam-1", NOTE)
        assert cloud.link.telemetry("cam-1") == known
    device.link.publish(topics.up("cam-1", "state"), state(2))
    device.link.publish(topics.up("cam-1", "telemetry"), encode(TELEMETRY), qos=1)
    device.link.publish(topics.up("cam-1", "rollout"), encode(NOTE))
    assert cloud.notes.get(timeout=5) == ("cam-1", NOTE)
    cloud.link.forget("cam-1")
    assert cloud.link.telemetry("cam-1") is None


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        ("state", b"{"),
        ("state", b"[]"),
        ("state", b"\xff\xfe"),
        ("state", b'{"session": "one", "online": true, "agent_version": "1"}'),
        ("state", b'{"online": true}'),
        ("state", b"{" + b" " * (MAX_MESSAGE_BYTES - 1)),
        ("rollout", b"{}"),
        ("rollout", b""),
        ("telemetry", encode(NOTE)),
    ],
)
def test_a_malformed_message_is_logged_and_changes_nothing(cloud, peer, caplog, kind: str, payload: bytes) -> None:
    device = peer("cam-1")
    device.link.publish(topics.up("cam-1", "state"), state(3))
    assert online_is(cloud.link, "cam-1")
    device.link.publish(topics.up("cam-1", kind), payload)
    device.link.publish(topics.up("cam-1", "rollout"), encode(NOTE))
    assert cloud.notes.get(timeout=5) == ("cam-1", NOTE)
    assert cloud.link.online() == {"cam-1"}
    assert cloud.states.qsize() == 1
    assert cloud.link.telemetry("cam-1") is None
    [line] = [one for one in caplog.records if "device.bad_message" in one.message]
    assert line.levelno == logging.WARNING
    assert f"device=cam-1 kind={kind} reason=" in line.message


def test_a_device_that_is_no_longer_enrolled_is_not_heard(cloud, peer, caplog) -> None:
    cloud.known.discard("cam-1")
    peer("cam-1").link.publish(topics.up("cam-1", "state"), state(1))
    peer("cam-2").link.publish(topics.up("cam-2", "state"), state(1))
    assert online_is(cloud.link, "cam-2")
    peer("cam-1").link.close()
    assert cloud.states.get(timeout=5)[0] == "cam-2"


def test_waiting_for_devices_wakes_with_them_and_ends_at_its_deadline(cloud, peer) -> None:
    waits: queue.Queue[bool] = queue.Queue()
    waiting = threading.Thread(
        target=lambda: waits.put(cloud.link.wait_until(lambda: len(cloud.link.online()) >= 2, 10))
    )
    waiting.start()
    for name in ("cam-1", "cam-2"):
        peer(name).link.publish(topics.up(name, "state"), state(1))
    assert waits.get(timeout=5)
    waiting.join(5)
    assert not cloud.link.wait_until(lambda: len(cloud.link.online()) > 2, 0.05)
    assert not cloud.link.wait_until(lambda: len(cloud.link.online()) > 2, -1.0)


def test_jobs_and_desired_releases_go_to_their_device_alone(cloud, peer) -> None:
    first, second = peer("cam-1", "edgefl/v1/down/cam-1/+"), peer("cam-2", "edgefl/v1/down/cam-2/+")
    closed = RoundClosed(job="j", round=3, job_ended=False)
    cloud.link.send_job("cam-1", closed)
    topic, payload = first.next()
    assert (topic, decode_job(payload)) == (topics.down("cam-1", "job"), closed)
    signed = Signed(text="{}", key_id="k", signature="s")
    cloud.link.send_desired("cam-2", signed)
    assert second.next()[0] == topics.down("cam-2", "desired")
    second.link.close()
    topic, payload = peer("cam-2", "edgefl/v1/down/cam-2/+").next()  # it was kept
    assert (topic, decode(Signed, payload)) == (topics.down("cam-2", "desired"), signed)
    assert first.inbox.empty()


def test_a_message_that_is_too_large_is_refused_where_it_is_made(cloud) -> None:
    with pytest.raises(ProtocolError, match="at most"):
        cloud.link.send_desired("cam-1", Signed(text="x" * MAX_MESSAGE_BYTES, key_id="k", signature="s"))


def test_a_forgotten_device_leaves_nothing_with_the_broker(cloud, peer) -> None:
    device = peer("cam-1", "edgefl/v1/down/cam-1/+")
    device.link.publish(topics.up("cam-1", "state"), state(1), retain=True)
    assert online_is(cloud.link, "cam-1")
    cloud.link.send_desired("cam-1", Signed(text="{}", key_id="k", signature="s"))
    device.next()
    device.link.close()
    cloud.link.forget("cam-1")
    assert cloud.link.online() == cloud.link.offline() == set()
    again = peer("cam-1", "edgefl/v1/down/cam-1/+")
    cloud.link.send_job("cam-1", RoundClosed(job="j", round=1, job_ended=True))
    assert again.next()[0] == topics.down("cam-1", "job")  # and nothing kept before it


def test_while_the_broker_is_away_nobody_is_online_and_rebirths_tell_again(cloud, peer, broker) -> None:
    device, topic = peer("cam-1"), topics.up("cam-1", "state")
    device.connects.get(timeout=5)
    device.link.publish(topic, state(1), retain=True)
    assert online_is(cloud.link, "cam-1")
    broker.stop()
    assert cloud.link.wait_until(lambda: cloud.link.offline() == {"cam-1"}, 5)
    assert cloud.states.get(timeout=5)[1].online
    assert not cloud.states.get(timeout=5)[1].online
    broker.start()
    assert cloud.link.wait_connected(5)
    device.connects.get(timeout=5)
    device.link.publish(topic, state(2), retain=True)
    assert online_is(cloud.link, "cam-1")


def test_a_cloud_that_comes_later_learns_who_is_there(broker, fleet_ca, peer) -> None:
    for name in ("cam-1", "cam-2"):
        device = peer(name)
        device.link.publish(topics.up(name, "state"), state(1), retain=True)
    device.link.publish(topics.up("cam-2", "state"), state(1, online=False), retain=True)
    device.link.close()
    link = ThreadedDeviceLink(broker.url, fleet_ca.cloud, DeviceLinkCallbacks(on_failure=pytest.fail))
    link.start()
    assert online_is(link, "cam-1")
    assert link.wait_until(lambda: link.offline() == {"cam-2"}, 5)
    link.close()


def test_a_closed_link_costs_latency_not_an_error(cloud, caplog) -> None:
    cloud.link.close()
    cloud.link.send_job("cam-1", RoundClosed(job="j", round=1, job_ended=False))
    assert "mqtt.not_sent" in caplog.text


AGENT = """
import asyncio, sys
from pathlib import Path
from edgefl.protocols import topics
from edgefl.protocols.messages import DeviceState, encode
from edgefl.protocols.mqtt import LinkConfig, MqttLink
from edgefl.protocols.tls import Identity
url, name, key, cert, ca = sys.argv[1:]
say = lambda online: (topics.up(name, "state"), encode(DeviceState(session=9, online=online, agent_version="1")))
link = MqttLink(
    LinkConfig(url=url, client_id=name, identity=Identity(Path(key), Path(cert), Path(ca)), will=lambda: say(False)),
    on_failure=print,
    on_connect=lambda: link.publish(*say(True), retain=True),
)
async def run():
    link.start()
    await asyncio.to_thread(sys.stdin.read)
asyncio.run(run())
"""


def test_a_killed_agent_is_offline_at_once(cloud, broker, fleet_ca) -> None:
    identity = fleet_ca.device("cam-1")
    arguments = [broker.url, "cam-1", identity.key, identity.cert, identity.ca]
    with subprocess.Popen([sys.executable, "-c", AGENT, *arguments], stdin=subprocess.PIPE) as process:
        assert online_is(cloud.link, "cam-1", timeout_s=20)
        process.kill()
        assert cloud.link.wait_until(lambda: cloud.link.offline() == {"cam-1"}, 2)


HOSTILE = [
    b'{"model":"m","state":"active","version":%s}' % number
    for number in (b"1e400", b"10000000000000000000000", b"9" * 4000, b"9" * 5000, b"NaN", b"true", b"-1", b"1.0")
] + [
    b'{"model":"m","version":1,"state":"\\ud800"}',
    b'{"model":"\\u001b[2J","version":1,"state":"active"}',
    b'{"model":"m\\u0000","version":1,"state":"active"}',
    b'{"version":1,"state":"active","' + b"k" * 30_000 + b'":1}',
    b"[" * 30_000,
    b'{"a":' * 5000 + b"1" + b"}" * 5000,
    b"\xff\xfe\x00",
]  # fmt: skip


def test_no_payload_costs_more_than_itself(cloud, peer) -> None:
    device = peer("cam-1")
    device.link.publish(topics.up("cam-1", "state"), state(3))
    assert online_is(cloud.link, "cam-1")
    for kind in topics.UP_KINDS:
        for payload in HOSTILE:
            device.link.publish(topics.up("cam-1", kind), payload)
    assert cloud.link.wait_connected(0)
    device.link.publish(topics.up("cam-1", "rollout"), encode(NOTE))
    assert cloud.notes.get(timeout=5) == ("cam-1", NOTE)
    assert cloud.link.online() == {"cam-1"}
    assert cloud.link.telemetry("cam-1") is None


def test_a_note_is_clean_where_it_enters(cloud, peer) -> None:
    payload = b'{"model":"m","version":1,"state":"failed","detail":"\\u001b[2Jbad\\n\\ud800 \\u0000"}'
    peer("cam-1").link.publish(topics.up("cam-1", "rollout"), payload)
    assert cloud.notes.get(timeout=5)[1].detail == "\\x1b[2Jbad \\ud800 \\x00"


def test_a_database_that_is_locked_for_a_while_loses_no_message(broker, fleet_ca, peer) -> None:
    cause = sqlite3.OperationalError("database is locked")
    cause.sqlite_errorcode = sqlite3.SQLITE_BUSY
    faults, states = [sa.exc.OperationalError("SELECT", {}, cause)] * 3, queue.Queue()

    def is_known(_device: str) -> bool:
        if faults:
            raise faults.pop()
        return True

    callbacks = DeviceLinkCallbacks(on_failure=pytest.fail, on_state=lambda *one: states.put(one), is_known=is_known)
    link = ThreadedDeviceLink(broker.url, fleet_ca.cloud, callbacks)
    link.start()
    assert link.wait_connected(5)
    peer("cam-1").link.publish(topics.up("cam-1", "state"), state(1))
    assert states.get(timeout=5)[0] == "cam-1"
    assert (faults, link.held_up) == ([], "")
    link.close()
