"""Rights, wills and retained states, the same over the built-in broker and mosquitto."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import sys

import pytest

from cloud.broker.packets import MAX_PACKET_BYTES
from edgefl.protocols.tls import client_context
from tests.raw_mqtt import EVERY_UP, answer, down, raw, raw_connect, up

# --- who may connect ---


def test_a_device_of_the_fleet_connects_by_tls_1_3(broker, fleet_ca) -> None:
    with raw(broker, fleet_ca.cloud.ca, fleet_ca.device("cam-1")) as connection:
        assert connection.version() == "TLSv1.3"
        connection.sendall(raw_connect())
        assert answer(connection) == b"\x20\x02\0\0"


def test_no_certificate_no_connection(broker, fleet_ca) -> None:
    with raw(broker, fleet_ca.cloud.ca) as connection:
        with contextlib.suppress(OSError):  # it may have been cut off already
            connection.sendall(raw_connect())
        assert answer(connection) == b""


def test_older_tls_is_refused(broker, fleet_ca) -> None:
    context = client_context(fleet_ca.cloud.ca, fleet_ca.device("cam-1"))
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    plain = socket.create_connection(("127.0.0.1", broker.port), timeout=5)
    with plain, pytest.raises((ssl.SSLError, ConnectionError)):
        context.wrap_socket(plain, server_hostname="127.0.0.1")


def test_garbage_ends_its_connection_and_nothing_else(broker, fleet_ca, peer) -> None:
    cloud = peer("cloud", EVERY_UP)
    for bytes_ in (b"GET / HTTP/1.1\r\n\r\n", b"\x10\xff\xff\xff\xff\xff", b"\x30\x03\0\1t", b"\0\0"):
        with raw(broker, fleet_ca.cloud.ca, fleet_ca.device("cam-2")) as connection:
            connection.sendall(bytes_)
            connection.settimeout(5)
            while answer(connection):
                pass
    peer("cam-1").link.publish(up("cam-1"), b"alive")
    assert cloud.next() == (up("cam-1"), b"alive")


# --- who may say and hear what ---


def test_a_device_that_publishes_elsewhere_has_no_effect(peer) -> None:
    cloud, victim = peer("cloud", "edgefl/v1/#"), peer("cam-2", "edgefl/v1/down/cam-2/+")
    thief = peer("cam-1")
    for topic in (up("cam-2"), down("cam-2"), "edgefl/v1/all", "edgefl/v1/up/cam-1/other", "elsewhere"):
        thief.link.publish(topic, b"forged")
        thief.link.publish(topic, b"forged and kept", retain=True)
    thief.link.publish(up("cam-1"), b"fence")
    assert cloud.next() == (up("cam-1"), b"fence")
    cloud.link.publish(down("cam-2"), b"true")
    assert victim.next() == (down("cam-2"), b"true")
    late = peer("cam-3", "edgefl/v1/down/cam-3/#")
    cloud.link.publish("edgefl/v1/down/cam-3/job", b"fence")
    assert late.next() == ("edgefl/v1/down/cam-3/job", b"fence")


@pytest.mark.parametrize(
    "filter_", ["#", "edgefl/v1/#", EVERY_UP, "edgefl/v1/down/+/desired", "edgefl/v1/down/cam-2/#", up("cam-2")]
)
def test_a_device_cannot_read_what_is_for_others(peer, filter_: str) -> None:
    """A broker may refuse the subscription or keep back the messages; both keep them secret."""
    cloud, other = peer("cloud", EVERY_UP), peer("cam-2", "edgefl/v1/down/cam-2/#")
    cloud.link.publish(down("cam-2"), b"kept secret", retain=True)
    other.link.publish(up("cam-2"), b"kept state", retain=True)
    assert other.next() == (down("cam-2"), b"kept secret")
    assert cloud.next() == (up("cam-2"), b"kept state")
    spy = peer("cam-1", filter_, timeout_s=0.4)
    if spy.connected:
        cloud.link.publish(down("cam-2"), b"secret")
        other.link.publish(up("cam-2"), b"state")
        assert other.next() == (down("cam-2"), b"secret")
        assert cloud.next() == (up("cam-2"), b"state")
        if filter_ in {"#", "edgefl/v1/#"}:
            cloud.link.publish(down("cam-1"), b"fence")
            assert spy.next() == (down("cam-1"), b"fence")
    assert spy.inbox.empty()


def test_connecting_alone_brings_no_kept_message_of_others(peer) -> None:
    cloud, other = peer("cloud", EVERY_UP), peer("cam-2", "edgefl/v1/down/cam-2/#")
    cloud.link.publish(down("cam-2"), b"kept secret", retain=True)
    other.link.publish(up("cam-2"), b"kept state", retain=True)
    assert (other.next()[1], cloud.next()[1]) == (b"kept secret", b"kept state")
    newcomer = peer("cam-1", "edgefl/v1/down/cam-1/#")
    cloud.link.publish(down("cam-1"), b"fence")
    assert newcomer.next() == (down("cam-1"), b"fence")


def test_a_client_id_of_another_does_not_end_its_connection(broker, fleet_ca, peer) -> None:
    cloud, victim = peer("cloud", EVERY_UP), peer("cam-2", "edgefl/v1/down/cam-2/#")
    for name in (b"cloud", b"cam-2"):
        with raw(broker, fleet_ca.cloud.ca, fleet_ca.device("cam-1")) as connection:
            connection.sendall(raw_connect(name))
            assert answer(connection) == b"\x20\x02\0\0"  # in, but as cam-1
    victim.link.publish(up("cam-2"), b"still here")
    assert cloud.next() == (up("cam-2"), b"still here")
    cloud.link.publish(down("cam-2"), b"still heard")
    assert victim.next() == (down("cam-2"), b"still heard")
    assert cloud.connects.qsize() == victim.connects.qsize() == 1


def test_a_will_on_anothers_topic_has_no_effect(broker, fleet_ca, peer) -> None:
    cloud = peer("cloud", EVERY_UP)
    with raw(broker, fleet_ca.cloud.ca, fleet_ca.device("cam-1")) as connection:
        connection.sendall(raw_connect(will_topic=up("cam-2").encode()))
        answer(connection)
    peer("cam-3").link.publish(up("cam-3"), b"fence")
    assert cloud.next() == (up("cam-3"), b"fence")
    assert peer("cloud", EVERY_UP).inbox.empty()


def test_a_packet_above_the_limit_ends_the_connection(broker, fleet_ca, peer) -> None:
    cloud = peer("cloud", EVERY_UP)
    size = MAX_PACKET_BYTES + 1
    with raw(broker, fleet_ca.cloud.ca, fleet_ca.device("cam-1")) as connection:
        connection.sendall(raw_connect())
        assert answer(connection) == b"\x20\x02\0\0"
        topic = up("cam-1").encode()
        header = bytes([0x30, size & 0x7F | 0x80, size >> 7 & 0x7F | 0x80, size >> 14])
        with contextlib.suppress(OSError):
            connection.sendall(header + len(topic).to_bytes(2) + topic + bytes(size - 2 - len(topic)))
        assert answer(connection) == b""
    peer("cam-2").link.publish(up("cam-2"), b"fence")
    assert cloud.next() == (up("cam-2"), b"fence")


# --- retained states and wills ---


def test_a_state_is_kept_for_a_cloud_that_comes_later(peer) -> None:
    device = peer("cam-1")
    device.link.publish(up("cam-1"), b"first", retain=True)
    device.link.publish(up("cam-1"), b"last", retain=True)
    device.link.close()
    assert peer("cloud", EVERY_UP).next() == (up("cam-1"), b"last")


CLIENT = """
import asyncio, sys
from pathlib import Path
from edgefl.protocols.mqtt import LinkConfig, MqttLink
from edgefl.protocols.tls import Identity
url, name, key, cert, ca = sys.argv[1:]
topic = f"edgefl/v1/up/{name}/state"
link = MqttLink(LinkConfig(url=url, client_id=name, identity=Identity(Path(key), Path(cert), Path(ca)),
                           will=lambda: (topic, b"gone")), on_failure=print)
async def run():
    link.start()
    assert await link.wait_connected(10)
    link.publish(topic, b"here", retain=True)
    await asyncio.to_thread(sys.stdin.read)
asyncio.run(run())
"""


def test_the_will_of_a_killed_process_is_published_and_kept(broker, fleet_ca, peer) -> None:
    cloud, identity = peer("cloud", EVERY_UP), fleet_ca.device("cam-1")
    arguments = [broker.url, "cam-1", identity.key, identity.cert, identity.ca]
    with subprocess.Popen([sys.executable, "-c", CLIENT, *arguments], stdin=subprocess.PIPE) as process:
        assert cloud.next(20) == (up("cam-1"), b"here")
        process.kill()
    assert cloud.next() == (up("cam-1"), b"gone")
    assert peer("cloud", EVERY_UP).next() == (up("cam-1"), b"gone")


def test_the_will_of_a_taken_over_connection_comes_before_the_next_birth(broker, fleet_ca, peer) -> None:
    cloud = peer("cloud", EVERY_UP)
    topic = up("cam-1").encode()
    with raw(broker, fleet_ca.cloud.ca, fleet_ca.device("cam-1")) as half_open:
        half_open.sendall(raw_connect(will_topic=topic))
        assert answer(half_open) == b"\x20\x02\0\0"
        again = peer("cam-1")
        again.link.publish(up("cam-1"), b"back")
        assert [cloud.next()[1], cloud.next()[1]] == [b"boom", b"back"]
        assert answer(half_open) == b""


@pytest.mark.parametrize("broker", ["builtin"], indirect=True)  # mosquitto looks every 5 s only
def test_a_silent_device_is_given_up_after_its_keepalive(broker, fleet_ca, peer) -> None:
    cloud = peer("cloud", EVERY_UP)
    packet = bytearray(raw_connect(will_topic=up("cam-1").encode()))
    packet[11] = 1  # s
    with raw(broker, fleet_ca.cloud.ca, fleet_ca.device("cam-1")) as mute:
        mute.sendall(packet)
        assert answer(mute) == b"\x20\x02\0\0"
        assert cloud.next(10) == (up("cam-1"), b"boom")
