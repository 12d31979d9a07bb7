import numpy as np
import pytest
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from edgefl.errors import ConfigError
from edgefl.flower.internals import give_id, task_identity
from edgefl.flower.nodes import Delivery, InProcess, NodeReply, Nodes, node_name
from edgefl.testing import ManualClock


@pytest.fixture(autouse=True)
def server_app():
    with task_identity(1):
        yield


def nodes(count=3):
    return Nodes(1, count, {"rounds": 2})


def delivery(of, node_id=1000):
    message = Message(RecordDict({"arrays": ArrayRecord([np.zeros(1)])}), node_id, "train")
    give_id(message, f"message-{node_id}")
    return Delivery(message, of.context(node_id))


def counting_app(*, fail=False):
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        context.state["seen"] = MetricRecord({"times": 1})
        if fail:
            raise ValueError("no data here")
        return Message(RecordDict(), reply_to=message)

    return app


def run(app, *deliveries, clock=None, within_s=60.0):
    return list(InProcess("app", app, clock or ManualClock()).run(deliveries, within_s))


def test_a_nodes_context_says_its_partition_and_is_its_own():
    of = nodes()
    context = of.context(1002)
    assert context.node_config == {"partition-id": 2, "num-partitions": 3}
    context.run_config["rounds"] = 99
    assert of.context(1002).run_config == {"rounds": 2}
    assert node_name(1002) == "partition-2"
    with pytest.raises(ConfigError, match="there is no node 7; nodes are 1000 to 1002"):
        of.context(7)
    with pytest.raises(ConfigError, match="1 node or more, not 0"):
        nodes(0)


def test_state_stays_with_its_node():
    of = nodes()
    (answer,) = run(counting_app(), delivery(of, 1001))
    of.keep(answer)
    assert "seen" in of.context(1001).state
    assert "seen" not in of.context(1000).state
    of.keep(NodeReply(answer.reply, 1001, RecordDict()))
    assert "seen" not in of.context(1001).state


def test_a_client_that_fails_changes_nothing_and_is_answered_for():
    of = nodes()
    (answer,) = run(counting_app(fail=True), delivery(of))
    assert answer.reply.has_error()
    assert "ValueError: no data here" in answer.reply.error.reason
    of.keep(answer)
    assert "seen" not in of.context(1000).state


def test_a_reply_that_is_no_message_is_a_failure():
    app = ClientApp()

    @app.train()
    def train(_message: Message, _context: Context) -> Message:
        return "nonsense"

    (answer,) = run(app, delivery(nodes()))
    assert "returned a str, not a Message" in answer.reply.error.reason


def test_who_takes_too_long_is_not_heard_and_the_others_are():
    clock, of = ManualClock(), nodes()
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        clock.advance(20 if context.node_id == 1000 else 6)
        return Message(RecordDict(), reply_to=message)

    answers = run(app, *(delivery(of, node) for node in of.ids()), clock=clock, within_s=10)
    assert [answer.node_id for answer in answers] == list(of.ids())[1:]


def test_a_nodes_config_has_what_was_given_beside_its_partition():
    of = Nodes(1, 2, {}, {"site": "a", "rate": 0.5})
    assert of.context(1001).node_config == {"site": "a", "rate": 0.5, "partition-id": 1, "num-partitions": 2}
    with pytest.raises(ConfigError, match="partition-id of a simulated node is its position"):
        Nodes(1, 2, {}, {"partition-id": 3})
