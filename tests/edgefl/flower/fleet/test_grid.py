"""The Grid of a fleet: sends at once, yields what comes, and says of a device that is lost what Flower says."""

from __future__ import annotations

import errno
import threading
import time

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from edgefl.errors import ConfigError
from edgefl.flower.fleet import wire
from edgefl.flower.fleet.grid import FleetDevices, FleetGrid
from edgefl.flower.internals import ErrorCode, RunNotRunningException, give_id, task_identity
from edgefl.flower.tracker import RoundTracker
from edgefl.operator.client import CloudClient, load_credentials
from edgefl.operator.relay import Relay
from edgefl.protocols.messages import DeviceState


class Nodes:
    """What the played devices do: `held` ones wait, `bad` ones answer with other bytes, `broken` ones with a reason."""

    def __init__(self):
        self.held: dict[str, threading.Event] = {}
        self.bad, self.broken, self.asked = set(), set(), []

    def __call__(self, device, plan, content):
        self.asked.append(device)
        if device in self.held:
            assert self.held[device].wait(10)
        if device in self.broken:
            return "no flower here"
        message, config = wire.open_order(content, plan.envelope)
        reply = Message(RecordDict({"a": ConfigRecord({"device": device, **config})}), reply_to=message)
        give_id(reply, "")
        return b"\xffgarbage" if device in self.bad else wire.pack_reply(reply)


@pytest.fixture
def nodes():
    return Nodes()


@pytest.fixture
def grid(http_plane, play_devices, nodes):
    play_devices(nodes, "a", "b", "c")

    def client():
        return CloudClient(None, load_credentials(http_plane.credentials))

    with Relay(client, "app:app", http_plane.blobs.put(b"zip")) as relay, task_identity(7):
        devices = FleetDevices(relay)
        yield FleetGrid(7, relay, devices, {"rate": 0.5}, RoundTracker(time.monotonic, name=devices.name))


def to_all(grid, **options):
    content = RecordDict({"c": ConfigRecord({"x": 1})})
    return [Message(content, node, "query", **options) for node in grid.get_node_ids()]


def who(replies):
    return sorted(reply.content["a"]["device"] for reply in replies)


def test_replies_arrive_while_others_are_awaited(grid, nodes, http_plane):
    nodes.held["a"] = threading.Event()
    replies = iter(grid.send_and_receive(to_all(grid)))
    first, second = next(replies), next(replies)
    assert who([first, second]) == ["b", "c"]
    assert first.content["a"]["rate"] == 0.5
    assert first.metadata.src_node_id in grid.get_node_ids()
    nodes.held["a"].set()
    assert who(replies) == ["a"]
    assert list((http_plane.folder / "relays").glob("*/*")) == []  # what the messages held is gone


def test_the_timeout_stands_still_while_the_cloud_can_store_nothing(grid, nodes, http_plane, tmp_path):
    nodes.held["a"] = threading.Event()
    relay, storage = grid._relay, http_plane.relays._deps.storage
    storage._folder = tmp_path
    ask = relay.paused_s

    def asked_at_the_timeout():
        seen = ask()
        nodes.held["a"].set()
        return seen

    relay.paused_s = asked_at_the_timeout
    storage.refused(OSError(errno.ENOSPC, "full"), 1 << 50)  # more than a disk has
    assert who(grid.send_and_receive(to_all(grid), timeout=0.2)) == ["a", "b", "c"]


def test_messages_of_one_content_share_it(grid, nodes, http_plane):
    nodes.held = {name: threading.Event() for name in "abc"}
    grid.push_messages(to_all(grid))
    assert len(list((http_plane.folder / "relays").glob("*/*"))) == 1
    for event in nodes.held.values():
        event.set()


def test_pushing_and_pulling_do_not_wait(grid, nodes):
    nodes.held["b"] = threading.Event()
    ids = list(grid.push_messages(to_all(grid)))
    seen = []
    end_s = time.monotonic() + 10
    while len(seen) < 2 and time.monotonic() < end_s:
        seen += grid.pull_messages(ids)
    assert who(seen) == ["a", "c"]
    assert list(grid.pull_messages([*ids, "unknown"])) == []
    nodes.held["b"].set()
    while len(seen) < 3 and time.monotonic() < end_s:
        seen += grid.pull_messages(ids)
    assert who(seen) == ["a", "b", "c"]
    assert {reply.metadata.reply_to_message_id for reply in seen} == set(ids)


def test_a_node_may_have_several_messages(grid, nodes):
    node = grid.get_node_ids()[0]
    replies = grid.send_and_receive([Message(RecordDict(), node, "query") for _ in range(3)])
    assert len(replies) == 3
    assert len(set(nodes.asked)) == 1


def test_who_is_late_is_not_heard_and_is_told(grid, nodes, http_plane):
    nodes.held["c"] = threading.Event()
    assert who(grid.send_and_receive(to_all(grid), timeout=0.5)) == ["a", "b"]
    closed = [device for device, told in http_plane.link.told if told.kind == "closed"]
    assert closed == ["c"]
    nodes.held["c"].set()


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ("broken", ErrorCode.CLIENT_APP_CRASHED, "no flower here"),
        ("bad", ErrorCode.UNKNOWN, "device b: a reply is not in Flower's form"),
    ],
)
def test_a_reply_that_is_none_is_an_error_of_its_node(grid, nodes, fault, code, said):
    getattr(nodes, fault).add("b")
    replies = grid.send_and_receive(to_all(grid))
    [error] = [reply.error for reply in replies if reply.has_error()]
    assert error.code == code
    assert said in error.reason
    assert len(replies) == 3


def test_a_device_that_is_lost_is_an_error_of_its_node(grid, nodes, http_plane):
    nodes.held["b"] = threading.Event()
    replies = iter(grid.send_and_receive(to_all(grid)))
    assert who([next(replies), next(replies)]) == ["a", "c"]
    http_plane.link.states["b"] = DeviceState(session=2, online=False, agent_version="0")
    assert http_plane.relays.look() == 30.0
    http_plane.clock.advance(30.0)
    http_plane.relays.look()
    lost = next(replies)
    assert (lost.error.code, lost.error.reason) == (ErrorCode.NODE_UNAVAILABLE, "device b: offline for 30 s")
    nodes.held["b"].set()


def test_a_node_that_is_not_there_is_refused(grid):
    with pytest.raises(ConfigError, match="there is no node 5 among the devices that are online"):
        grid.send_and_receive([Message(RecordDict(), 5, "query")])


def test_after_the_end_there_are_no_nodes(grid):
    grid.close()
    with pytest.raises(RunNotRunningException):
        grid.get_node_ids()
