"""The built-in broker: who gets in, packets that no agent of ours sends, floods, and who reads nothing."""

from __future__ import annotations

import contextlib
import queue
import socket
import ssl
import threading

import pytest

from cloud.broker.builtin import MAX_FILTERS
from cloud.shares import PortShare
from edgefl.errors import ConfigError, PartFailed
from edgefl.protocols.mqtt import LinkConfig
from edgefl.protocols.tls import Identity, new_request, serial_number, sign_request
from tests.raw_mqtt import EVERY_UP, answer, down, raw, raw_connect, up
from tests.threaded import Broker, Link


def test_a_port_in_use_is_named(fleet_ca) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f":{port}: another program uses this port.*--mqtt-port"):
            Broker(fleet_ca.cloud, "127.0.0.1", port).start()


def test_port_0_takes_a_free_one_and_a_restart_keeps_it(fleet_ca) -> None:
    broker = Broker(fleet_ca.cloud, "127.0.0.1", 0)
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
    with Broker(fleet_ca.cloud, "127.0.0.1", 0, is_known=lambda name, _: name in known) as broker:
        config = LinkConfig(url=broker.url, client_id="cam-1", identity=fleet_ca.device("cam-1"))
        with Link(config, on_failure=pytest.fail, on_disconnect=lambda: downs.put(None)) as link:
            assert link.wait_connected(5)
            known.clear()
            broker.drop("cam-1")
            downs.get(timeout=5)
            assert not link.wait_connected(0.8)
            assert "Not authorized" in link.reason


def test_a_certificate_with_no_devices_name_is_refused(fleet_ca, caplog) -> None:
    broker = Broker(fleet_ca.cloud, "127.0.0.1", 0)
    with broker, raw(broker, fleet_ca.cloud.ca, fleet_ca.device("operator")) as connection:
        connection.sendall(raw_connect())
        assert answer(connection) == b"\x20\x02\0\5"
    assert "broker.refused device=operator" in caplog.text


def test_insecure_is_for_the_loopback_and_keeps_the_same_rights(fleet_ca) -> None:
    with pytest.raises(ConfigError, match="loopback"):
        Broker(None, "192.0.2.1", 0).start()
    heard: queue.Queue[tuple[str, bytes]] = queue.Queue()
    with Broker(None, "127.0.0.1", 0) as broker:
        listening = LinkConfig(url=broker.url, client_id="cloud", subscriptions=[(EVERY_UP, 1)])
        with Link(listening, on_failure=pytest.fail, on_message=lambda *message: heard.put(message)) as cloud:
            assert cloud.wait_connected(5)
            with Link(LinkConfig(url=broker.url, client_id="cam-1"), on_failure=pytest.fail) as device:
                device.publish(up("cam-2"), b"forged")
                device.publish(up("cam-1"), b"mine")
                assert heard.get(timeout=5) == (up("cam-1"), b"mine")


def test_a_certificate_of_another_serial_number_is_refused_and_disturbs_nobody(fleet_ca, caplog) -> None:
    former, again = fleet_ca.device("cam-1"), fleet_ca.device("cam-1-again")
    again.cert.write_bytes(sign_request(fleet_ca.folder, new_request(again, "cam-1"), "cam-1"))
    valid = serial_number(again.cert.read_bytes())
    broker = Broker(fleet_ca.cloud, "127.0.0.1", 0, is_known=lambda _, serial: serial == valid)
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
    with Broker(fleet_ca.cloud, "127.0.0.1", 0, share=share) as broker, contextlib.ExitStack() as links:

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
    with Broker(fleet_ca.cloud, "127.0.0.1", 0, share=share) as broker, contextlib.ExitStack() as strangers:
        for _ in range(60):
            strangers.enter_context(socket.create_connection(("127.0.0.1", broker.port), timeout=5))
        config = LinkConfig(url=broker.url, client_id="cam-1", identity=fleet_ca.device("cam-1"))
        with Link(config, on_failure=pytest.fail) as link:
            assert link.wait_connected(30)


def test_a_broker_whose_port_fails_says_so(fleet_ca) -> None:
    failures: queue.Queue[BaseException] = queue.Queue()
    with Broker(fleet_ca.cloud, "127.0.0.1", 0, on_failure=failures.put) as broker:
        broker.inner._listener._port.socket.shutdown(socket.SHUT_RDWR)
        assert isinstance(failures.get(timeout=10), PartFailed)


# --- packets that no agent of ours sends ---

CONNECTED = b"\x20\x02\0\0"
NEXT_ID = b"\0\x07"


@pytest.fixture
def alone(fleet_ca):
    """`alone(name)`: a raw connection to a built-in broker, as this client, after its CONNACK."""
    with Broker(fleet_ca.cloud, "127.0.0.1", 0) as broker, contextlib.ExitStack() as connections:

        def connect(name: str, hello: bytes = b"") -> ssl.SSLSocket:
            identity = fleet_ca.cloud if name == "cloud" else fleet_ca.device(name)
            connection = connections.enter_context(raw(broker, fleet_ca.cloud.ca, identity))
            connection.sendall(hello or raw_connect(name.encode()))
            assert connection.recv(4) == CONNECTED
            return connection

        yield connect


def with_topic(head: int, topic: str, rest: bytes, before: bytes = b"") -> bytes:
    body = before + len(topic).to_bytes(2) + topic.encode() + rest
    return bytes([head, len(body)]) + body


def test_what_a_device_has_no_right_to_is_answered_and_goes_no_further(alone, caplog) -> None:
    cam, cloud = alone("cam-1"), alone("cloud")
    cloud.sendall(with_topic(0x82, "edgefl/v1/#", b"\1", NEXT_ID))
    assert cloud.recv(5) == b"\x90\3" + NEXT_ID + b"\1"
    cam.sendall(with_topic(0x32, up("cam-2"), NEXT_ID))
    assert cam.recv(4) == b"\x40\2" + NEXT_ID
    cam.sendall(with_topic(0x34, up("cam-2"), NEXT_ID))
    assert cam.recv(4) == b"\x50\2" + NEXT_ID
    cam.sendall(with_topic(0x30, up("cam-2"), b""))
    cam.sendall(with_topic(0x82, up("cam-2"), b"\1", NEXT_ID))
    assert cam.recv(5) == b"\x90\3" + NEXT_ID + b"\x80"
    cam.sendall(with_topic(0x30, up("cam-1"), b"mine"))
    assert cloud.recv(100) == with_topic(0x30, up("cam-1"), b"mine")
    assert caplog.text.count("broker.refused device=cam-1 action=") == 4


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (b"\x30\x81\x88\x02", "packet has 33793 bytes"),
        (b"\x36\x06\0\1t\0\1x", "has QoS 3"),
        (b"\x30\x04\0\1#x", "not a valid topic"),
        (b"\x30\x04\0\1\xffx", "UTF-8"),
        (b"\x82\2\0\1", "has no filter"),
        (b"\x82\6\0\1\0\1t\3", "has QoS 3"),
        (b"\x40\1x", "shorter than its fields"),
        (b"\xf0\0", "type 15"),
        (raw_connect(), "type 1"),
    ],
)
def test_a_packet_that_is_none_ends_its_connection_by_name(alone, caplog, packet, reason) -> None:
    cam = alone("cam-1")
    cam.sendall(packet + b"\xc0\0")
    assert answer(cam) == b""
    assert "broker.closed device=cam-1" in caplog.text
    assert reason in caplog.text


@pytest.mark.parametrize("packet", [b"\xc0\0", b"\x40\2\0\1", with_topic(0x30, up("cam-1"), b"x")])
def test_whatever_a_device_floods_with_its_share_is_what_is_read(alone, monkeypatch, packet) -> None:
    monkeypatch.setattr("cloud.broker.share.PACKETS_BURST", 5)
    monkeypatch.setattr("cloud.broker.share.PACKETS_PER_S", 1e-3)
    cam, other = alone("cam-1"), alone("cloud")
    other.sendall(with_topic(0x82, EVERY_UP, b"\0", NEXT_ID))
    assert other.recv(5)[0] == 0x90
    cam.sendall(packet * 20 + with_topic(0x30, up("cam-1"), b"too late"))
    drained(other)  # others have their turn
    cam.settimeout(0.3)
    with contextlib.suppress(TimeoutError):
        assert len(cam.recv(1000)) <= 2 * 5
    assert b"too late" not in drained(other)


def drained(connection: ssl.SSLSocket) -> bytes:
    """Return what has come before the answer to a PINGREQ."""
    connection.sendall(b"\xc0\0")
    data = b""
    while not data.endswith(b"\xd0\0"):
        data += connection.recv(1000)
    return data


def test_a_device_does_not_subscribe_for_ever(alone, caplog) -> None:
    cam = alone("cam-1")
    for _ in range(MAX_FILTERS):
        cam.sendall(with_topic(0x82, down("cam-1"), b"\1", NEXT_ID))
        assert cam.recv(5)[0] == 0x90
    cam.sendall(with_topic(0x82, down("cam-1"), b"\1", NEXT_ID))
    assert answer(cam) == b""
    assert "more than 64 filters" in caplog.text


def test_a_message_of_qos_2_that_is_sent_again_is_passed_on_once(alone) -> None:
    cam, cloud = alone("cam-1"), alone("cloud")
    cloud.sendall(with_topic(0x82, EVERY_UP, b"\0", NEXT_ID))
    assert cloud.recv(5)[0] == 0x90
    for head in (0x34, 0x3C):
        cam.sendall(with_topic(head, up("cam-1"), NEXT_ID + b"once"))
        assert cam.recv(4) == b"\x50\2" + NEXT_ID
    cam.sendall(b"\x62\2" + NEXT_ID)
    assert cam.recv(4) == b"\x70\2" + NEXT_ID
    assert drained(cloud).count(b"once") == 1


def test_a_client_that_reads_nothing_is_given_up_and_costs_nobody_else(alone, monkeypatch, caplog) -> None:
    monkeypatch.setattr("cloud.broker.builtin.WRITE_S", 0.3)
    cloud, other = alone("cloud"), alone("cam-2")
    deaf = alone("cam-1", raw_connect(b"cam-1", will_topic=up("cam-1").encode()))
    cloud.sendall(with_topic(0x82, EVERY_UP, b"\0", NEXT_ID))
    deaf.sendall(with_topic(0x82, down("cam-1"), b"\0", NEXT_ID))
    body = len(down("cam-1")).to_bytes(2) + down("cam-1").encode() + bytes(32_000)
    message = bytes([0x30, len(body) & 0x7F | 0x80, len(body) >> 7 & 0x7F | 0x80, len(body) >> 14]) + body
    for _ in range(1000):  # more than the system's buffers take
        cloud.sendall(message)
    drained(other)
    cloud.settimeout(20)
    while b"boom" not in cloud.recv(100):
        pass
    assert 'broker.closed device=cam-1 reason="it read nothing for 0.3 s"' in caplog.text


def test_a_connection_that_never_said_who_it_is_does_not_hold_up_the_stop() -> None:
    with Broker(None, "127.0.0.1", 0) as broker, socket.create_connection(("127.0.0.1", broker.port)) as mute:
        mute.sendall(b"\x10")
        with Link(LinkConfig(url=broker.url, client_id="cam-1"), on_failure=pytest.fail) as later:
            assert later.wait_connected(5)  # so the mute one has been accepted
        broker.stop()


def test_a_registry_that_is_slow_holds_up_nobody_else(fleet_ca) -> None:
    locked, asked = threading.Event(), threading.Event()

    def is_known(name: str, _serial: str | None) -> bool:
        if name == "cam-1":
            asked.set()
            locked.wait(30)
        return True

    with Broker(fleet_ca.cloud, "127.0.0.1", 0, is_known=is_known) as broker:
        slow = Link(LinkConfig(url=broker.url, client_id="cam-1", identity=fleet_ca.device("cam-1")),
                    on_failure=pytest.fail)  # fmt: skip
        other = LinkConfig(url=broker.url, client_id="cam-2", identity=fleet_ca.device("cam-2"))
        with slow:
            assert asked.wait(10)
            with Link(other, on_failure=pytest.fail) as link:
                assert link.wait_connected(10)
            locked.set()
            assert slow.wait_connected(10)
