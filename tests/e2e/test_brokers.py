"""What MQTT 3.1.1 promises, asked of both brokers by paho: the behaviours of Paho's public interoperability tests.

The same clients, over TLS and within a fleet's rights, at the built-in broker and at mosquitto as we configure it.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from edgefl.protocols.tls import client_context
from tests.raw_mqtt import answer, down, raw, raw_connect, up

pytestmark = pytest.mark.soak
WAIT_S = 10.0
ROOT = "edgefl/v1"


class Client:
    """A paho client that keeps what it hears; `name` is that of its certificate."""

    def __init__(self, port, identity, name, *, clean=True, will=None, acknowledges=True):
        self.heard, self.acks = queue.Queue(), queue.Queue()
        self._up = queue.Queue()
        self.paho = paho.Client(
            CallbackAPIVersion.VERSION2, name, clean_session=clean, manual_ack=not acknowledges,
            reconnect_on_failure=False,
        )  # fmt: skip
        self.paho.tls_set_context(client_context(identity.ca, identity))
        self.paho.on_connect = lambda _client, _data, flags, code, _properties: self._up.put((flags, code))
        self.paho.on_message = lambda _client, _data, message: self.heard.put(message)
        self.paho.on_subscribe = lambda _client, _data, _mid, codes, _properties: self.acks.put(codes)
        self.paho.on_unsubscribe = lambda *_: self.acks.put(None)
        if will is not None:
            self.paho.will_set(*will, qos=1)
        self.paho.connect("127.0.0.1", port, keepalive=5)
        self.paho.loop_start()
        flags, code = self._up.get(timeout=WAIT_S)
        assert code == 0
        self.was_here = flags.session_present

    def subscribe(self, *filters, qos=2):
        self.paho.subscribe([(one, qos) for one in filters])
        return [code.value for code in self.acks.get(timeout=WAIT_S)]

    def unsubscribe(self, *filters):
        self.paho.unsubscribe(list(filters))
        self.acks.get(timeout=WAIT_S)

    def say(self, topic, payload, qos=1, *, retain=False):
        self.paho.publish(topic, payload, qos, retain).wait_for_publish(WAIT_S)

    def next(self):
        message = self.heard.get(timeout=WAIT_S)
        return message.topic, message.payload, message.qos, message.retain

    def close(self):
        self.paho.disconnect()
        self.paho.loop_stop()

    def cut(self):
        """End as a process ends that is killed."""
        self.paho.socket().shutdown(socket.SHUT_RDWR)
        self.paho.loop_stop()


@pytest.fixture
def client(broker, fleet_ca):
    with contextlib.ExitStack() as clients:

        def connect(name, **options):
            identity = fleet_ca.cloud if name == "cloud" else fleet_ca.device(name)
            one = Client(broker.port, identity, name, **options)
            clients.callback(one.close)
            return one

        yield connect


def test_each_quality_of_service_arrives_as_it_was_sent_or_asked_for(client):
    cloud, cam = client("cloud"), client("cam-1")
    assert cloud.subscribe(f"{ROOT}/up/+/state") == [2]
    for qos in (0, 1, 2):
        cam.say(up("cam-1"), b"%d" % qos, qos)
        assert cloud.next() == (up("cam-1"), b"%d" % qos, qos, False)
    assert cloud.subscribe(f"{ROOT}/up/+/state", qos=0) == [0]
    cam.say(up("cam-1"), b"lowered", 2)
    assert cloud.next() == (up("cam-1"), b"lowered", 0, False)


def test_overlapping_filters_bring_a_message_once_or_once_for_each(client):
    cloud, cam = client("cloud"), client("cam-1")
    cloud.subscribe(f"{ROOT}/up/+/state", qos=1)
    cloud.subscribe(f"{ROOT}/up/#", qos=2)
    cam.say(up("cam-1"), b"one", 2)
    cam.say(f"{ROOT}/up/cam-1/rollout", b"fence", 2)
    seen = []
    while (message := cloud.next())[1] != b"fence":
        seen.append(message[2])
    assert sorted(seen) in ([2], [1, 2], [1])  # mosquitto 2.0 takes the QoS of the filter that it finds first


def test_retained_messages_come_with_a_subscription_until_they_are_cleared(client):
    cam, cloud = client("cam-1"), client("cloud")
    for qos, kind in enumerate(("state", "rollout", "telemetry")):
        cam.say(f"{ROOT}/up/cam-1/{kind}", b"kept", qos, retain=True)
    cloud.subscribe(f"{ROOT}/up/+/+")
    seen = sorted(cloud.next() for _ in range(3))
    assert [(message[0].rpartition("/")[2], *message[1:]) for message in seen] == [
        ("rollout", b"kept", 1, True), ("state", b"kept", 0, True), ("telemetry", b"kept", 2, True),
    ]  # fmt: skip
    cam.say(up("cam-1"), b"", 1, retain=True)
    assert cloud.next()[:2] == (up("cam-1"), b"")
    cloud.close()
    again = client("cloud")
    again.subscribe(f"{ROOT}/up/+/state")
    cam.say(up("cam-1"), b"fence")
    assert again.next()[1] == b"fence"


def test_what_comes_while_a_client_is_away_waits_for_it(client):
    cam, cloud = client("cam-1", clean=False), client("cloud")
    assert not cam.was_here
    cam.subscribe(f"{ROOT}/down/cam-1/+")
    cam.close()
    for qos in (0, 1, 2):
        cloud.say(down("cam-1"), b"%d" % qos, qos)
    cloud.say(down("cam-1"), b"fence", 2)
    cam = client("cam-1", clean=False)
    assert cam.was_here
    seen = []
    while (message := cam.next())[1] != b"fence":
        seen.append(message[1])
    assert [one for one in seen if one != b"0"] == [b"1", b"2"]
    cam.close()
    clean = client("cam-1")
    assert not clean.was_here
    clean.close()
    assert not client("cam-1", clean=False).was_here


def test_what_was_not_acknowledged_is_sent_again(client):
    cam, cloud = client("cam-1", clean=False, acknowledges=False), client("cloud")
    cam.subscribe(f"{ROOT}/down/cam-1/+")
    for number in range(3):
        cloud.say(down("cam-1"), b"%d" % number, 1)
    assert [cam.next()[1] for _ in range(3)] == [b"0", b"1", b"2"]
    cam.cut()
    cam = client("cam-1", clean=False)
    assert cam.was_here
    assert [cam.next()[1] for _ in range(3)] == [b"0", b"1", b"2"]
    cam.close()
    cam = client("cam-1", clean=False)
    cloud.say(down("cam-1"), b"fence", 1)
    assert cam.next()[1] == b"fence"


def test_a_will_goes_out_where_there_was_no_goodbye_and_only_there(client):
    cloud = client("cloud")
    cloud.subscribe(f"{ROOT}/up/+/+")
    client("cam-1", will=(up("cam-1"), b"never said")).close()
    client("cam-2", will=(up("cam-2"), b"gone")).cut()
    assert cloud.next()[:2] == (up("cam-2"), b"gone")


def test_a_client_that_falls_silent_is_given_up_and_one_without_keep_alive_is_not(broker, fleet_ca, client):
    cloud = client("cloud")
    cloud.subscribe(f"{ROOT}/up/+/+")
    for_ever = bytearray(raw_connect(b"cam-2", will_topic=up("cam-2").encode()))
    for_ever[10:12] = b"\0\0"
    soon = bytearray(raw_connect(will_topic=up("cam-1").encode()))
    soon[10:12] = b"\0\2"
    with (
        raw(broker, fleet_ca.cloud.ca, fleet_ca.device("cam-2")) as patient,
        raw(broker, fleet_ca.cloud.ca, fleet_ca.device("cam-1")) as mute,
    ):
        for connection, hello in ((patient, for_ever), (mute, soon)):
            connection.sendall(hello)
            assert answer(connection) == b"\x20\x02\0\0"
        began_s = time.monotonic()
        message = cloud.heard.get(timeout=30)
        assert (message.topic, message.payload) == (up("cam-1"), b"boom")
        assert time.monotonic() - began_s >= 2
        patient.sendall(b"\xc0\0")
        assert answer(patient) == b"\xd0\0"


def test_what_is_unsubscribed_is_heard_no_more(client):
    cloud, cam = client("cloud"), client("cam-1")
    cloud.subscribe(*(f"{ROOT}/up/cam-1/{kind}" for kind in ("state", "rollout", "telemetry")))
    cloud.unsubscribe(up("cam-1"))
    for kind in ("state", "rollout", "telemetry"):
        cam.say(f"{ROOT}/up/cam-1/{kind}", b"x")
    assert {cloud.next()[0].rpartition("/")[2] for _ in range(2)} == {"rollout", "telemetry"}
    assert cloud.heard.empty()


@pytest.mark.parametrize("filter_", ["$SYS/#", "#", "$share/x/edgefl/v1/up/#"])
def test_a_device_hears_nothing_of_the_broker_itself(client, filter_):
    cam, cloud = client("cam-1"), client("cloud")
    cam.subscribe(filter_, f"{ROOT}/down/cam-1/desired")
    cam.say("$SYS/broker/version", b"forged", retain=True)
    cloud.say(down("cam-1"), b"fence")
    seen = []
    while (message := cam.next())[1] != b"fence":
        seen.append(message)
    assert seen == []


def test_twenty_devices_at_once_lose_nothing(client):
    cloud = client("cloud")
    cloud.subscribe(f"{ROOT}/up/+/+")
    cams = [client(f"cam-{number}") for number in range(20)]

    def talk(number):
        for count in range(25):
            cams[number].say(up(f"cam-{number}"), b"%d" % count)

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(len(cams))]
    for thread in threads:
        thread.start()
    heard = {}
    for _ in range(20 * 25):
        topic, payload, _, _ = cloud.next()
        heard.setdefault(topic, []).append(int(payload))
    for thread in threads:
        thread.join(WAIT_S)
    assert heard == {up(f"cam-{number}"): list(range(25)) for number in range(20)}
