import logging

import numpy as np
import pytest
from flwr.app import Array, Message, RecordDict
from flwr.serverapp import server_app
from flwr.serverapp.strategy import FedAvg, Strategy

from edgefl.flower import inside


def test_messages_can_be_made_while_the_identity_lasts():
    with inside.task_identity(7):
        message = Message(RecordDict(), 1000, "train")
        assert message.metadata.run_id == 7
        inside.give_id(message, "abc")
        reply = inside.error_reply(message, "it broke")
    assert message.metadata.message_id == "abc"
    assert (reply.error.reason, reply.metadata.reply_to_message_id) == ("it broke", "abc")


def test_flower_is_as_it_was_afterwards():
    before = Strategy.start, server_app.start_grid, logging.getLogger("flwr").level
    with inside.listening(), inside.logging_from(logging.ERROR):
        assert Strategy.start is not before[0]

    def fail():
        with inside.listening(), inside.logging_from(logging.ERROR):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (Strategy.start, server_app.start_grid, logging.getLogger("flwr").level) == before


def test_what_a_strategy_returns_is_heard(monkeypatch):
    monkeypatch.setattr(Strategy, "start", lambda _self: inside.Result())
    with inside.listening() as heard:
        returned = FedAvg().start()
    assert heard == [returned]


def test_a_twin_has_metadata_of_its_own_and_an_arrays_twin_its_bytes():
    with inside.task_identity(1):
        message = Message(RecordDict(), 1000, "train")
    twin = inside.with_own_metadata(message)
    inside.give_id(twin, "twin")
    assert message.metadata.message_id != "twin"
    assert not inside.without_content(message).has_content()
    assert message.has_content()
    array = Array(np.arange(3))
    assert inside.twin_of(array).numpy().tolist() == [0, 1, 2]
