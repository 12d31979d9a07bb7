"""The real MQTT link over the simulated broker: wills, retained messages, QoS 1 over lost connections."""

from __future__ import annotations

import pytest

from edgefl.faults.machine import threads
from edgefl.faults.machine.kernel import Kernel, Node
from edgefl.faults.machine.mqtt import SimBroker, client_factory, matches
from edgefl.faults.machine.network import Network
from edgefl.protocols import mqtt
from edgefl.protocols.link_config import LinkConfig
from edgefl.protocols.tls import Identity


@pytest.mark.parametrize(
    ("pattern", "topic", "fits"),
    [("a/b", "a/b", True), ("a/+", "a/b", True), ("a/+", "a/b/c", False), ("a/#", "a/b/c", True), ("b", "a", False)],
)
def test_patterns(pattern, topic, fits):
    assert matches(pattern, topic) is fits


@pytest.fixture
def world(tmp_path, monkeypatch):
    kernel = Kernel(5)
    threads.enter(kernel)
    network = Network(kernel)
    kernel.network = network
    monkeypatch.setattr(mqtt, "new_client", client_factory(lambda: network))
    monkeypatch.setattr(mqtt, "client_context", lambda *_: None)
    monkeypatch.setattr(mqtt, "ThreadPoolExecutor", threads.SimExecutor)
    server = Node(kernel, "s", tmp_path)

    async def serve():
        async with SimBroker(network, 7, lambda name, _serial: name != "stranger", "s"):
            pass

    kernel.call_in(server, lambda: server.loop.create_task(serve()))
    yield kernel
    threads.leave()
    kernel.close()


def link(kernel, tmp_path, name, topics, seen, will=None):
    node = Node(kernel, name, tmp_path)
    node.loop.executor = threads.SimExecutor()
    config = LinkConfig(
        url="mqtts://h:7",
        client_id=name,
        identity=Identity.in_folder(tmp_path),
        server_name="",
        subscriptions=[(one, 1) for one in topics],
        will=None if will is None else lambda: will,
    )
    made = mqtt.MqttLink(config, on_failure=seen.append, on_message=lambda *one: seen.append(one))
    kernel.call_in(node, made.start)
    return node, made


def test_what_is_published_arrives_also_what_was_retained_and_the_will(world, tmp_path):
    seen, others = [], []
    node, one = link(world, tmp_path, "one", [], others, will=("up/one/state", b"gone"))
    world.run(lambda: one.is_up, 10.0)
    one.publish("up/one/state", b"here", retain=True)
    world.run(lambda: not one.unsent(), 10.0)
    link(world, tmp_path, "two", ["up/+/state"], seen)
    world.run(lambda: bool(seen), 10.0)
    assert seen[0] == ("up/one/state", b"here")
    world.network.end_of(node, unnoticed=False)
    world.kill(node)
    world.run(lambda: seen[-1][1] == b"gone", 20.0)
    assert set(seen) == {("up/one/state", b"here"), ("up/one/state", b"gone")}


def test_a_message_of_qos_1_survives_a_lost_connection(world, tmp_path):
    seen, others = [], []
    link(world, tmp_path, "two", ["t"], seen)
    _, one = link(world, tmp_path, "one", [], others)
    world.run(lambda: one.is_up, 10.0)
    for number in range(20):
        one.publish("t", b"%d" % number)
    world.run(lambda: False, world.now_s + 0.01)
    world.network.break_link("one", "s")
    world.run(lambda: not one.unsent(), 30.0)
    world.run(lambda: False, world.now_s + 1)
    assert {int(payload) for _, payload in seen} == set(range(20))


def test_a_stranger_is_not_admitted(world, tmp_path):
    seen = []
    _, one = link(world, tmp_path, "stranger", [], seen)
    world.run(lambda: False, 10.0)
    assert not one.is_up
