"""The gate around amqtt: what amqtt alone would lose or leak under concurrent clients."""

from __future__ import annotations

import queue
import socket

import pytest
from amqtt.broker import Broker

from cloud.broker.embedded import EmbeddedBroker
from cloud.broker.gate import QuietBroker
from edgefl.protocols import topics
from edgefl.protocols.mqtt import LinkConfig
from tests.threaded import Link


def test_the_methods_that_we_override_are_amqtts() -> None:
    assert all(hasattr(Broker, name) for name in vars(QuietBroker) if name.startswith("_publish"))
    assert any(name.startswith("_publish") for name in vars(QuietBroker))


def test_no_birth_is_lost_while_others_connect_and_subscribe(fleet_ca) -> None:
    """amqtt with a topic plugin drops a message when a client subscribes during its delivery."""
    names = [f"cam-{number}" for number in range(30)]
    heard: queue.Queue[str] = queue.Queue()

    def agent(name: str) -> Link:
        config = LinkConfig(
            url=broker.url, client_id=name, identity=fleet_ca.device(name), subscriptions=[(topics.down(name, "+"), 1)]
        )
        link = Link(
            config,
            on_failure=pytest.fail,
            on_connect=lambda: link.publish(topics.up(name, "state"), b"born", retain=True),
        )
        return link

    with EmbeddedBroker(fleet_ca.cloud, "127.0.0.1", 0) as broker:
        config = LinkConfig(
            url=broker.url, client_id="cloud", identity=fleet_ca.cloud, subscriptions=[(topics.EVERY_UP, 1)]
        )
        with Link(
            config, on_failure=pytest.fail, on_message=lambda topic, _: heard.put(topics.parse_up(topic)[0])
        ) as cloud:
            assert cloud.wait_connected(5)
            links = [agent(name) for name in names]
            for link in links:
                link.start()
            assert all(link.wait_connected(10) for link in links)
            assert {heard.get(timeout=5) for _ in names} == set(names)
            for link in links:
                link.close()


def test_a_connection_that_never_said_who_it_is_does_not_hold_up_the_stop(fleet_ca, monkeypatch) -> None:
    monkeypatch.setattr("cloud.broker.gate.CONNECT_S", 3600.0)
    broker = EmbeddedBroker(None, "127.0.0.1", 0)
    broker.start()
    with socket.create_connection(("127.0.0.1", broker.port), timeout=5) as mute:
        mute.sendall(b"\x10")
        with Link(LinkConfig(url=broker.url, client_id="cam-1"), on_failure=pytest.fail) as later:
            assert later.wait_connected(5)  # so the mute one has been accepted
        broker.stop()
