"""Replies arrive while they are iterated, once or as a list, and stop at the timeout."""

import itertools

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from edgefl.errors import ConfigError
from edgefl.flower.grid import LocalGrid, Replies, streamed
from edgefl.flower.inside import Run, task_identity
from edgefl.flower.nodes import InProcess, Nodes
from edgefl.flower.watch import Watch
from edgefl.testing import ManualClock


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def asked():
    return []


@pytest.fixture
def grid(clock, asked):
    app = ClientApp()

    @app.query()
    def query(message, context):
        asked.append(context.node_id)
        clock.advance(1)
        return Message(RecordDict({"n": ConfigRecord({"n": context.node_id})}), reply_to=message)

    with task_identity(1):
        yield LocalGrid(1, Nodes(1, 4, {}), InProcess("test", app, clock), Watch(clock))


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


def test_nobody_starts_after_the_timeout_and_who_is_late_is_not_heard(grid, asked):
    assert len(list(grid.send_and_receive(messages(grid), timeout=2.5))) == 2
    assert len(asked) == 3


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
