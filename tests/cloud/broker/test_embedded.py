"""Rights, wills and retained states, the same over the embedded broker and mosquitto."""

from __future__ import annotations

import contextlib
import queue
import socket
import ssl
import subprocess
import sys
import threading

import pytest

from cloud.broker.embedded import EmbeddedBroker
from cloud.broker.wire import MAX_PACKET_BYTES
from cloud.shares import PortShare
from edgefl.errors import ConfigError, MissingExtra
from edgefl.protocols.mqtt import LinkConfig
from edgefl.protocols.tls import Identity, client_context, new_request, serial_number, sign_request
from tests.threaded import Link

EVERY_UP = "edgefl/v1/up/+/+"


def up(device: str) -> str:
    return f"edgefl/v1/up/{device}/state"


def down(device: str) -> str:
    return f"edgefl/v1/down/{device}/desired"


# --- who may connect ---


def raw_connect(client_id: bytes = b"cam-1", *, will_topic: bytes = b"") -> bytes:
    will = b"" if not will_topic else len(will_topic).to_bytes(2) + will_topic + b"\0\4boom"
    body = b"\0\4MQTT\4" + (b"\x26" if will else b"\x02") + b"\0\x0a" + len(client_id).to_bytes(2) + client_id + will
    return bytes([0x10, len(body)]) + body


@contextlib.contextmanager
def raw(broker, ca, identity=None):
    context = client_context(ca, identity)
    plain = socket.create_connection(("127.0.0.1", broker.port), timeout=5)
    with plain, context.wrap_socket(plain, server_hostname="127.0.0.1") as secure:
        yield secure


def answer(connection: ssl.SSLSocket) -> bytes:
    """What comes back, if anything does before the connection ends."""
    try:
        return connection.recv(100)
    except TimeoutError:
        raise
    except OSError:
        return b""


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


@pytest.mark.parametrize("broker", ["embedded"], indirect=True)  # mosquitto looks every 5 s only
def test_a_silent_device_is_given_up_after_its_keepalive(broker, fleet_ca, peer) -> None:
    cloud = peer("cloud", EVERY_UP)
    packet = bytearray(raw_connect(will_topic=up("cam-1").encode()))
    packet[11] = 1  # s
    with raw(broker, fleet_ca.cloud.ca, fleet_ca.device("cam-1")) as mute:
        mute.sendall(packet)
        assert answer(mute) == b"\x20\x02\0\0"
        assert cloud.next(10) == (up("cam-1"), b"boom")


# --- the embedded broker alone ---


def test_a_port_in_use_is_named_and_amqtt_logs_no_trace_of_it(fleet_ca, caplog) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f":{port}: another program uses this port.*--mqtt-port"):
            EmbeddedBroker(fleet_ca.cloud, "127.0.0.1", port).start()
    assert caplog.text == ""


def test_port_0_takes_a_free_one_and_a_restart_keeps_it(fleet_ca) -> None:
    broker = EmbeddedBroker(fleet_ca.cloud, "127.0.0.1", 0)
    broker.stop()  # not running: nothing to do
    broker.start()
    port = broker.port
    assert broker.url == f"mqtts://127.0.0.1:{port}"
    broker.stop()
    broker.start()
    broker.stop()
    assert broker.port == port
    assert not [one for one in threading.enumerate() if one.name == "broker"]


def test_a_device_that_was_removed_is_dropped_and_stays_out(fleet_ca) -> None:
    known = {"cam-1"}
    downs: queue.Queue[None] = queue.Queue()
    with EmbeddedBroker(fleet_ca.cloud, "127.0.0.1", 0, is_known=lambda name, _: name in known) as broker:
        config = LinkConfig(url=broker.url, client_id="cam-1", identity=fleet_ca.device("cam-1"))
        with Link(config, on_failure=pytest.fail, on_disconnect=lambda: downs.put(None)) as link:
            assert link.wait_connected(5)
            known.clear()
            broker.drop("cam-1")
            downs.get(timeout=5)
            assert not link.wait_connected(0.8)
            assert "Not authorized" in link.reason


def test_a_certificate_with_no_devices_name_is_refused(fleet_ca, caplog) -> None:
    broker = EmbeddedBroker(fleet_ca.cloud, "127.0.0.1", 0)
    with broker, raw(broker, fleet_ca.cloud.ca, fleet_ca.device("operator")) as connection:
        connection.sendall(raw_connect())
        assert answer(connection) == b"\x20\x02\0\5"
    assert "broker.refused device=operator" in caplog.text


def test_insecure_is_for_the_loopback_and_keeps_the_same_rights(fleet_ca) -> None:
    with pytest.raises(ConfigError, match="loopback"):
        EmbeddedBroker(None, "192.0.2.1", 0)
    heard: queue.Queue[tuple[str, bytes]] = queue.Queue()
    with EmbeddedBroker(None, "127.0.0.1", 0) as broker:
        listening = LinkConfig(url=broker.url, client_id="cloud", subscriptions=[(EVERY_UP, 1)])
        with Link(listening, on_failure=pytest.fail, on_message=lambda *message: heard.put(message)) as cloud:
            assert cloud.wait_connected(5)
            with Link(LinkConfig(url=broker.url, client_id="cam-1"), on_failure=pytest.fail) as device:
                device.publish(up("cam-2"), b"forged")
                device.publish(up("cam-1"), b"mine")
                assert heard.get(timeout=5) == (up("cam-1"), b"mine")


def test_without_amqtt_the_extra_is_named(fleet_ca, monkeypatch) -> None:
    for name in [one for one in sys.modules if one.split(".")[0] == "amqtt" or one == "cloud.broker.gate"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("cloud.broker.gate", raising=False)
    monkeypatch.setitem(sys.modules, "amqtt", None)
    with pytest.raises(MissingExtra, match=r"\[broker\] extra"):
        EmbeddedBroker(fleet_ca.cloud, "127.0.0.1", 0).start()


def test_a_certificate_of_another_serial_number_is_refused_and_disturbs_nobody(fleet_ca, caplog) -> None:
    former, again = fleet_ca.device("cam-1"), fleet_ca.device("cam-1-again")
    again.cert.write_bytes(sign_request(fleet_ca.folder, new_request(again, "cam-1"), "cam-1"))
    valid = serial_number(again.cert.read_bytes())
    broker = EmbeddedBroker(fleet_ca.cloud, "127.0.0.1", 0, is_known=lambda _, serial: serial == valid)
    with (
        broker,
        Link(LinkConfig(url=broker.url, client_id="cam-1", identity=again), on_failure=pytest.fail) as link,
    ):
        assert link.wait_connected(5)
        with raw(broker, fleet_ca.cloud.ca, former) as connection:
            connection.sendall(raw_connect())
            assert answer(connection) == b"\x20\x02\0\5"
        assert link.wait_connected(0)
    assert "not with this certificate" in caplog.text
    assert "broker.taken_over" not in caplog.text


def test_a_device_that_finds_no_place_is_told_and_the_cloud_always_has_one(fleet_ca, caplog) -> None:
    share = PortShare(seats=2, waiting=4)
    with EmbeddedBroker(fleet_ca.cloud, "127.0.0.1", 0, share=share) as broker, contextlib.ExitStack() as links:

        def connect(name: str, identity: Identity) -> Link:
            link = Link(LinkConfig(url=broker.url, client_id=name, identity=identity), on_failure=pytest.fail)
            return links.enter_context(link)

        assert all(connect(f"cam-{n}", fleet_ca.device(f"cam-{n}")).wait_connected(30) for n in (1, 2))
        late = connect("cam-3", fleet_ca.device("cam-3"))
        assert connect("cloud", fleet_ca.cloud).wait_connected(30)
        assert not late.wait_connected(1)
        assert "server unavailable" in late.reason.lower()
        assert "device.no_seat device=cam-3" in caplog.text


def test_strangers_that_say_nothing_make_room(fleet_ca) -> None:
    share = PortShare(seats=4, waiting=2)
    with EmbeddedBroker(fleet_ca.cloud, "127.0.0.1", 0, share=share) as broker, contextlib.ExitStack() as strangers:
        for _ in range(60):
            strangers.enter_context(socket.create_connection(("127.0.0.1", broker.port), timeout=5))
        config = LinkConfig(url=broker.url, client_id="cam-1", identity=fleet_ca.device("cam-1"))
        with Link(config, on_failure=pytest.fail) as link:
            assert link.wait_connected(30)


def test_a_broker_whose_part_ends_starts_again_on_its_port(fleet_ca, monkeypatch, caplog) -> None:
    monkeypatch.setattr("cloud.broker.embedded.AGAIN_S", 0.01)
    ups, downs = queue.Queue(), queue.Queue()
    with EmbeddedBroker(fleet_ca.cloud, "127.0.0.1", 0, on_failure=pytest.fail) as broker:
        config = LinkConfig(url=broker.url, client_id="cam-1", identity=fleet_ca.device("cam-1"))
        link = Link(
            config, on_failure=pytest.fail, on_connect=lambda: ups.put(None), on_disconnect=lambda: downs.put(None)
        )
        with link:
            ups.get(timeout=10)
            port = broker.port
            broker._loop.call_soon_threadsafe(broker._gate.broadcasting.cancel)
            downs.get(timeout=10)
            ups.get(timeout=10)
            assert (broker.port, broker.alive) == (port, True)
    assert "broker.fault" in caplog.text
    assert not broker.alive


def test_a_broker_that_cannot_be_kept_says_so(fleet_ca, monkeypatch) -> None:
    monkeypatch.setattr("cloud.broker.embedded.AGAIN_S", 0.01)
    failures: queue.Queue[BaseException] = queue.Queue()
    broker = EmbeddedBroker(fleet_ca.cloud, "127.0.0.1", 0, on_failure=failures.put)
    broker.start()

    async def fail(_parts) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(broker, "_until_stopped", fail)
    broker._loop.call_soon_threadsafe(broker._gate.broadcasting.cancel)
    assert isinstance(failures.get(timeout=10), ZeroDivisionError)
    broker.stop()
    assert not broker.alive
