"""The link against real brokers: it comes back, it loses nothing silently, it ends when told to."""

from __future__ import annotations

import logging
import queue
import resource
import socket
import threading

import pytest

from edgefl.errors import CloudUnreachable, ProtocolError
from edgefl.protocols import mqtt
from edgefl.protocols.messages import MAX_MESSAGE_BYTES
from edgefl.protocols.mqtt import LinkConfig
from edgefl.protocols.tls import request_for, saved_key, sign_request
from tests.threaded import Link

UP = "edgefl/v1/up/cam-1/state"
# paho leaves a socket whose handshake failed to the garbage collector.
failed_handshakes = pytest.mark.filterwarnings("ignore:unclosed <ssl.SSLSocket:ResourceWarning")


def test_messages_pass_both_ways_in_order(peer) -> None:
    cloud, device = peer("cloud", "edgefl/v1/up/+/+"), peer("cam-1", "edgefl/v1/down/cam-1/+")
    for number in range(50):
        device.link.publish(UP, b"%d" % number)
    assert [cloud.next() for _ in range(50)] == [(UP, b"%d" % number) for number in range(50)]
    cloud.link.publish("edgefl/v1/down/cam-1/job", b"plan")
    cloud.link.publish("edgefl/v1/down/cam-1/desired", b"1")
    assert [device.next(), device.next()] == [
        ("edgefl/v1/down/cam-1/job", b"plan"),
        ("edgefl/v1/down/cam-1/desired", b"1"),
    ]


def test_the_largest_message_passes_and_a_larger_one_is_refused_before_it_is_sent(peer) -> None:
    cloud, device = peer("cloud", "edgefl/v1/up/+/+"), peer("cam-1")
    with pytest.raises(ProtocolError, match=str(MAX_MESSAGE_BYTES)):
        device.link.publish(UP, bytes(MAX_MESSAGE_BYTES + 1))
    device.link.publish(UP, bytes(MAX_MESSAGE_BYTES))
    assert len(cloud.next()[1]) == MAX_MESSAGE_BYTES


def test_after_a_broker_restart_the_link_is_back_and_subscribed(broker, peer) -> None:
    cloud, device = peer("cloud", "edgefl/v1/up/+/+"), peer("cam-1")
    for one in (cloud, device):
        one.connects.get(timeout=5)
    broker.stop()
    device.link.publish(UP, b"said while the broker was away")
    broker.start()
    for one in (cloud, device):
        one.connects.get(timeout=30)
    device.link.publish(UP, b"said after")
    while cloud.next()[1] != b"said after":
        pass


def test_what_is_said_before_the_broker_is_there_arrives(broker, peer, fleet_ca) -> None:
    cloud = peer("cloud", "edgefl/v1/up/+/+")
    link = Link(
        LinkConfig(url=broker.url, client_id="cam-1", identity=fleet_ca.device("cam-1")), on_failure=pytest.fail
    )
    link.publish(UP, b"early")
    link.start()
    assert cloud.next() == (UP, b"early")
    link.close()


def test_close_gives_what_is_queued_time_to_arrive_and_no_will_follows(peer) -> None:
    cloud, device = peer("cloud", "edgefl/v1/up/+/+"), peer("cam-1", will=lambda: (UP, b"died"))
    for number in range(30):
        device.link.publish(UP, b"%d" % number)
    device.link.close()
    assert [cloud.next()[1] for _ in range(30)] == [b"%d" % number for number in range(30)]
    other = peer("cam-2")
    other.link.publish("edgefl/v1/up/cam-2/state", b"fence")
    assert cloud.next()[1] == b"fence"
    with pytest.raises(CloudUnreachable, match="closed"):
        device.link.publish(UP, b"too late")


@failed_handshakes
def test_a_certificate_of_another_ca_is_refused_by_both_sides(broker, fleet_ca, strange_ca, peer) -> None:
    stranger = strange_ca.device("cam-1")
    distrusts = peer("cam-1", identity=stranger, timeout_s=0.5)
    assert not distrusts.connected
    assert "certificate verify failed" in distrusts.link.reason.lower()
    forged = type(stranger)(stranger.key, stranger.cert, fleet_ca.cloud.ca)  # trusts us, but is of another CA
    refused = peer("cam-1", identity=forged, timeout_s=0.5)
    assert not refused.connected
    assert refused.link.reason


@failed_handshakes
def test_the_brokers_certificate_must_be_for_the_host_we_asked(free_port, fleet_ca) -> None:
    from edgefl.protocols import tls
    from tests.threaded import Broker

    folder = fleet_ca.folder / "other-host"
    folder.mkdir()
    elsewhere = tls.Identity(folder / "key.pem", folder / "cert.pem", fleet_ca.folder / "ca.pem")
    tls.issue_server(fleet_ca.folder, elsewhere, ["broker.example"])
    config = LinkConfig(url=f"mqtts://127.0.0.1:{free_port}", client_id="cam-1", identity=fleet_ca.device("cam-1"))
    with Broker(elsewhere, "127.0.0.1", free_port), Link(config, on_failure=pytest.fail) as link:
        assert not link.wait_connected(0.5)
        assert "IP address mismatch" in link.reason


def test_a_bad_message_is_logged_and_the_link_goes_on(peer, broker, fleet_ca, caplog) -> None:
    heard: queue.Queue[bytes] = queue.Queue()

    def receive(topic: str, payload: bytes) -> None:
        if payload == b"bad":
            raise ProtocolError("no sense in it")
        heard.put(payload)

    device = peer("cam-1")
    config = LinkConfig(
        url=broker.url, client_id="cloud", identity=fleet_ca.cloud, subscriptions=[("edgefl/v1/up/+/+", 1)]
    )
    with Link(config, on_failure=pytest.fail, on_message=receive) as link:
        assert link.wait_connected(5)
        device.link.publish(UP, b"bad")
        device.link.publish(UP, b"good")
        assert heard.get(timeout=5) == b"good"
    [line] = [one for one in caplog.records if "mqtt.bad_message" in one.message]
    assert line.levelno == logging.WARNING
    assert UP in line.message
    assert "no sense in it" in line.message


def test_a_defect_that_a_message_finds_costs_that_message_only(peer, broker, fleet_ca, caplog) -> None:
    heard: queue.Queue[bytes] = queue.Queue()

    def stumble(topic: str, payload: bytes) -> None:
        if payload == b"poison":
            raise ZeroDivisionError
        heard.put(payload)

    device = peer("cam-1")
    device.link.publish(UP, b"poison", retain=True)  # it comes again with each connection
    config = LinkConfig(
        url=broker.url, client_id="cloud", identity=fleet_ca.cloud, subscriptions=[("edgefl/v1/up/+/+", 1)]
    )
    with Link(config, on_failure=pytest.fail, on_message=stumble) as link:
        assert link.wait_connected(5)
        device.link.publish("edgefl/v1/up/cam-1/rollout", b"good")
        assert heard.get(timeout=5) == b"good"
        assert link.wait_connected(0)
    [line] = [one for one in caplog.records if "mqtt.message_lost" in one.message]
    assert line.levelno == logging.CRITICAL
    assert line.exc_info is not None


def test_a_fault_of_the_link_itself_is_survived(peer, broker, fleet_ca, caplog) -> None:
    faults, connects, downs = [ZeroDivisionError(), OSError(24, "Too many open files")], queue.Queue(), queue.Queue()

    def stumble() -> None:
        connects.put(None)
        if faults:
            raise faults.pop()

    config = LinkConfig(url=broker.url, client_id="cam-1", identity=fleet_ca.device("cam-1"))
    with Link(config, on_failure=pytest.fail, on_connect=stumble, on_disconnect=lambda: downs.put(None)) as link:
        assert link.wait_connected(10)
        link.publish(UP, b"and it works")
    assert connects.qsize() == 3
    assert downs.qsize() == 1  # the end; it was not up before
    assert caplog.text.count("mqtt.fault") == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_link_that_cannot_be_healed_ends_loudly(broker, fleet_ca, monkeypatch) -> None:
    failures: queue.Queue[BaseException] = queue.Queue()
    monkeypatch.setattr(mqtt, "FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(mqtt, "LAST_DELAY_S", 0.01)

    def stumble() -> None:
        raise ZeroDivisionError

    config = LinkConfig(url=broker.url, client_id="cam-1", identity=fleet_ca.device("cam-1"))
    with Link(config, on_connect=stumble, on_failure=failures.put) as link:
        assert isinstance(failures.get(timeout=10), ZeroDivisionError)
        with pytest.raises(CloudUnreachable, match="ZeroDivisionError"):
            link.publish(UP, b"")
        with pytest.raises(CloudUnreachable, match="ZeroDivisionError"):
            link.wait_connected(5)


def test_a_link_is_told_whom_to_tell_of_its_end() -> None:
    with pytest.raises(TypeError, match="on_failure"):
        Link(LinkConfig(url="mqtt://127.0.0.1:9", client_id="cam-1"))


def test_a_full_queue_is_said_not_swallowed(free_port, monkeypatch) -> None:
    monkeypatch.setattr(mqtt, "MAX_QUEUED", 3)
    with Link(LinkConfig(url=f"mqtt://127.0.0.1:{free_port}", client_id="cam-1"), on_failure=pytest.fail) as link:
        for _ in range(3):
            link.publish(UP, b"kept")
        with pytest.raises(CloudUnreachable, match="3 messages are waiting"):
            link.publish(UP, b"one too many")
        link.publish(UP, b"telemetry may be lost", qos=0)


def test_an_absent_broker_is_named_once_and_close_does_not_hang(free_port, caplog) -> None:
    with Link(LinkConfig(url=f"mqtt://127.0.0.1:{free_port}", client_id="cam-1"), on_failure=pytest.fail) as link:
        assert not link.wait_connected(1.2)  # three attempts
        assert "refused" in link.reason
    assert len([one for one in caplog.records if one.levelno == logging.WARNING]) == 1
    assert not [one for one in threading.enumerate() if one.name == "mqtt-cam-1"]


def test_a_broker_that_takes_calls_and_says_nothing_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"mqtt://127.0.0.1:{mute.getsockname()[1]}"
        with Link(LinkConfig(url=url, client_id="cam-1", keepalive_s=1), on_failure=pytest.fail) as link:
            mute.settimeout(10)
            first, _ = mute.accept()
            second, _ = mute.accept()  # it dialled again
            first.close()
            second.close()
            assert not link.wait_connected(0)


def test_a_link_that_was_never_started_closes() -> None:
    link = Link(LinkConfig(url="mqtt://127.0.0.1:9", client_id="cam-1"), on_failure=pytest.fail)
    link.close()
    link.close()


def test_a_process_with_more_than_1024_open_files_still_has_a_link(peer, broker) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip(f"this machine allows {hard} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    files = [open("/dev/null", "rb") for _ in range(1100)]  # noqa: SIM115, PTH123
    try:
        device = peer("cam-1", "edgefl/v1/down/cam-1/+")
        assert device.connected
        peer("cloud").link.publish("edgefl/v1/down/cam-1/job", b"plan")
        assert device.next()[1] == b"plan"
    finally:
        for file in files:
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_link_that_reconnects_shows_the_certificate_that_is_in_its_file_now(broker, fleet_ca, peer) -> None:
    listener = peer("cloud", "edgefl/v1/up/+/+")
    wills: list[bytes] = []

    def will() -> tuple[str, bytes]:
        wills.append(b"will %d" % len(wills))
        return UP, wills[-1]

    identity = fleet_ca.device("cam-1")
    link = peer("cam-1", will=will).link
    identity.cert.write_bytes(b"damaged")
    link.reconnect("its certificate is new")
    while link.reason in {"", "its certificate is new"}:
        link.wait_connected(0.01)
    link.publish(UP, b"waits")  # while the link is down
    identity.cert.write_bytes(sign_request(fleet_ca.folder, request_for(saved_key(identity.key), "cam-1"), "cam-1"))
    assert link.wait_connected(10)
    assert listener.next() == (UP, b"waits")  # and no will: it left in peace
