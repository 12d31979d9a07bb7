"""Replies arrive while they are iterated, once or as a list, and stop at the timeout."""

import itertools

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from edgefl.errors import ConfigError, EdgeflError
from edgefl.flower.grid import LocalGrid, Replies, streamed
from edgefl.flower.internals import Run, task_identity
from edgefl.flower.nodes import InProcess, Nodes
from edgefl.flower.tracker import RoundTracker
from edgefl.testing import ManualClock


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def asked():
    return []


@pytest.fixture
def seen():
    """Names of the messages that clients were at work on, in that order."""
    return []


class SlowGrid(LocalGrid):
    """A grid whose clients take a second each, or what is said here."""

    took = None


@pytest.fixture
def grid(clock, asked, seen):
    app = ClientApp()

    @app.query()
    def query(message, context):
        if grid.took is not None:
            grid.took(context.node_id)
        else:
            asked.append(context.node_id)
            clock.advance(1)
        seen.append(message.content.get("name", {"name": ""})["name"])
        turn = context.state.get("turn", ConfigRecord({"n": 0}))["n"] + 1
        context.state["turn"] = ConfigRecord({"n": turn})
        return Message(RecordDict({"n": ConfigRecord({"n": context.node_id, "turn": turn})}), reply_to=message)

    with task_identity(1):
        grid = SlowGrid(1, Nodes(1, 4, {}), InProcess("test", app, clock), RoundTracker(clock))
        yield grid


def to(node, name):
    return Message(RecordDict({"name": ConfigRecord({"name": name})}), node, "query")


def messages(grid, count=4):
    return [Message(RecordDict(), node, "query") for node in itertools.islice(grid.get_node_ids(), count)]


def test_a_reply_arrives_when_it_is_looked_for(grid, asked):
    replies = iter(grid.send_and_receive(messages(grid)))
    assert asked == []
    next(replies)
    assert len(asked) == 1


def test_replies_are_also_a_list(grid, asked):
    replies = grid.send_and_receive(messages(grid))
    assert replies
    assert len(asked) == 1
    assert len(replies) == 4
    assert [reply.metadata.src_node_id for reply in replies] == asked
    assert replies[-1].metadata.src_node_id == asked[-1]
    assert [one.content["n"]["n"] for one in replies[1:3]] == asked[1:3]
    assert len({reply.metadata.message_id for reply in replies}) == 4
    assert not grid.send_and_receive([])


def test_streamed_replies_are_not_kept_and_the_rest_of_them_left_undone(grid, asked):
    replies = grid.send_and_receive(messages(grid))
    stream = streamed(replies)
    next(stream)
    stream.close()
    assert len(asked) == 1
    assert len(replies) == 0
    grid.finish()
    assert len(asked) == 1


def test_a_client_that_takes_too_long_is_not_heard_and_takes_no_other_with_it(grid, asked, clock):
    def slow(node):
        asked.append(node)
        clock.advance(10 if node == 1001 else 1)

    grid.took = slow
    heard = [reply.metadata.src_node_id for reply in grid.send_and_receive(messages(grid), timeout=2.5)]
    assert heard == [1000, 1002, 1003]  # together they took longer than that, too
    assert asked == [1000, 1001, 1002, 1003]


def test_who_waits_for_no_reply_has_its_messages_executed_all_the_same(grid, asked):
    assert list(grid.send_and_receive(messages(grid), timeout=0)) == []
    grid.finish()
    assert len(asked) == 4


def test_what_is_pushed_runs_before_what_comes_later_to_the_same_node(grid, seen):
    grid.push_messages([to(1000, "a"), to(1001, "b"), to(1000, "c")])
    grid.push_messages([to(1000, "d")])
    assert seen == []
    assert len(grid.send_and_receive([to(1000, "e")])) == 1
    assert seen == ["a", "c", "d", "e"]
    grid.finish()
    assert seen == ["a", "c", "d", "e", "b"]
    grid.finish()
    assert len(seen) == 5


def test_what_runs_before_its_turn_to_be_pulled_is_still_there_to_be_pulled_once(grid, seen):
    first = list(grid.push_messages([to(1000, "a"), to(1001, "b")]))
    last = list(grid.push_messages([to(1000, "c")]))
    assert [reply.content["n"]["n"] for reply in grid.pull_messages(last)] == [1000]
    assert seen == ["a", "c"]
    assert [reply.content["n"]["n"] for reply in grid.pull_messages([*last, *first])] == [1000, 1001]
    assert list(grid.pull_messages([*first, *last])) == []
    assert seen == ["a", "c", "b"]


def test_messages_to_one_node_in_one_batch_meet_each_others_state(grid, seen):
    replies = grid.send_and_receive([to(1000, "a"), to(1000, "b"), to(1001, "c"), to(1000, "d")])
    assert sorted((reply.content["n"]["n"], reply.content["n"]["turn"]) for reply in replies) == [
        (1000, 1), (1000, 2), (1000, 3), (1001, 1),
    ]  # fmt: skip
    assert [name for name in seen if name != "c"] == ["a", "b", "d"]


def test_an_app_that_waits_for_nodes_that_will_not_come_is_told(grid, clock):
    for _ in range(20):
        assert len(grid.get_node_ids()) == 4  # at once: it only looks
    for _ in range(3):
        clock.advance(1)
        grid.get_node_ids()
    grid.push_messages([to(1000, "a")])  # it goes on
    for _ in range(9):
        grid.get_node_ids()
        clock.advance(1)
    with pytest.raises(
        ConfigError, match="more nodes than the 4 of this simulation, and no more will come: give --clie"
    ):
        grid.get_node_ids()


@pytest.mark.parametrize("wrong", [3, "text", None])
def test_what_is_no_message_is_refused_by_name(grid, wrong):
    with pytest.raises(ConfigError, match=f"sent a {type(wrong).__name__}; expected Messages"):
        grid.push_messages([to(1000, "a"), wrong])


def test_a_fault_of_ours_is_noted_and_one_of_the_apps_is_not(grid, monkeypatch):
    def broken():
        yield to(1000, "a")
        raise KeyError("the app's own")

    with pytest.raises(KeyError):
        grid.push_messages(broken())
    assert grid.boundary.fault is None
    monkeypatch.setattr(grid, "_numbers", None)
    with pytest.raises(TypeError):
        grid.push_messages([to(1000, "a")])
    with pytest.raises(EdgeflError, match=r"a fault of edgefl itself, not of adder: TypeError.*grid\.py:\d+"):
        grid.boundary.raise_fault("adder")


def test_a_foreign_iterable_streams_too():
    assert list(streamed([1, 2])) == [1, 2]
    assert isinstance(Replies(iter([])), Replies)


def test_an_unknown_node_is_refused_before_anything_is_sent(grid, asked):
    with pytest.raises(ConfigError, match="there is no node 5; nodes are 1000 to 1003"):
        grid.push_messages([*messages(grid), Message(RecordDict(), 5, "query")])
    grid.finish()
    assert asked == []


def test_the_run_is_the_grids_own(grid):
    assert grid.run.run_id == 1
    with pytest.raises(ConfigError, match="belongs to run 1"):
        grid.set_run(Run.create_empty(2))
    assert [node.node_id for node in grid.get_nodes()] == list(grid.get_node_ids())
    made = grid.create_message(RecordDict(), "query", 1000, "7", ttl=5.0)
    assert (made.metadata.group_id, made.metadata.ttl, made.metadata.src_node_id) == ("7", 5.0, 1)
