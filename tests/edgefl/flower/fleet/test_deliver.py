"""A device's part: the ClientApp answers, fails as in Flower, and remembers."""

import builtins

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from edgefl.errors import MissingExtra, ProtocolError, TaskError
from edgefl.flower.fleet import wire
from edgefl.flower.fleet.deliver import NodeMessage, deliver
from edgefl.flower.internals import ErrorCode, give_id, task_identity

COUNTS = """
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.query()
    def count(message, context):
        seen = context.state.config_records.get("seen", ConfigRecord({"n": 0}))["n"] + 1
        context.state["seen"] = ConfigRecord({"n": seen})
        facts = {"n": seen, "part": context.node_config["partition-id"], "rate": context.run_config["nested.rate"]}
        return Message(RecordDict({"facts": ConfigRecord(facts)}), reply_to=message)

    @app.query("forget")
    def forget(message, context):
        context.state.clear()
        return Message(RecordDict(), reply_to=message)

    @app.train()
    def train(message, context):
        context.state["seen"] = ConfigRecord({"n": 99})
        raise ValueError("no data here")

    @app.evaluate()
    def evaluate(message, context):
        raise MemoryError
"""


@pytest.fixture
def ask(make_app, tmp_path):
    """Send a message of some type to a ClientApp; return (reply, outcome)."""
    folder, numbers = {}, iter(range(1, 100))

    def send(kind, client=COUNTS, state=None, options=None):
        if not folder:
            folder["app"] = make_app(client=client)
        with task_identity(1):
            message = Message(RecordDict(), wire.node_id("cam-1"), kind)
        give_id(message, str(next(numbers)))
        order, kept = tmp_path / "order", tmp_path / "state"
        order.write_bytes(wire.pack_order({"nested.rate": 0.25}, message.content))
        if state is not None:
            kept.write_bytes(state)
        outcome = deliver(
            NodeMessage(
                app="adder", folder=folder["app"], order=order, envelope=wire.pack_envelope(message),
                options=options or {"part": "2"}, state=kept if state is not None else None,
            )
        )  # fmt: skip
        return wire.open_reply(outcome.reply, message), outcome

    return send


def test_a_client_answers_by_its_part_and_remembers(ask):
    reply, outcome = ask("query")
    assert dict(reply.content["facts"]) == {"n": 1, "part": 2, "rate": 0.25}
    reply, outcome = ask("query", state=outcome.state)
    assert reply.content["facts"]["n"] == 2
    assert ask("query.forget", state=outcome.state)[1].state == b""


def test_what_a_client_raises_is_an_error_reply_and_its_state_stays(ask):
    reply, outcome = ask("train", state=wire.pack_state(RecordDict({"seen": ConfigRecord({"n": 1})})))
    assert reply.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert "Flower app 'adder'" in reply.error.reason
    assert "ValueError: no data here" in reply.error.reason
    assert "client_app.py:" in reply.error.reason
    assert outcome.state is None


def test_a_client_that_cannot_be_imported_is_an_error_reply(ask):
    reply, _ = ask("query", client="import nowhere_to_be_found")
    assert reply.error.code == ErrorCode.LOAD_CLIENT_APP_EXCEPTION
    assert "No module named 'nowhere_to_be_found'" in reply.error.reason


def test_a_client_that_runs_out_of_memory_is_for_the_trainer_to_report(ask):
    with pytest.raises(TaskError, match="MemoryError"):
        ask("evaluate")


def test_a_damaged_state_is_said(ask):
    with pytest.raises(ProtocolError, match="a node's state"):
        ask("query", state=b"\xffgarbage")


def test_a_device_without_flower_says_what_it_lacks(ask, monkeypatch):
    real = builtins.__import__

    def without_flower(name, *rest):
        if name == "flwr":
            raise ImportError(name)
        return real(name, *rest)

    ask("query")
    monkeypatch.setattr(builtins, "__import__", without_flower)
    with pytest.raises(MissingExtra, match=r"needs the \[flower\] extra"):
        ask("query")
