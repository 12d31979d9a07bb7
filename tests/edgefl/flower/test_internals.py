import sys

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.common import Parameters, ndarrays_to_parameters
from flwr.server import LegacyContext, Server, SimpleClientManager
from flwr.server.history import History
from flwr.server.workflow.constant import MAIN_PARAMS_RECORD
from flwr.serverapp import server_app
from flwr.serverapp.strategy import FedAvg, Strategy

from edgefl.flower import internals

strategy_module = sys.modules[Strategy.__module__]


def test_messages_can_be_made_while_the_identity_lasts():
    with internals.task_identity(7):
        message = Message(RecordDict(), 1000, "train")
        assert message.metadata.run_id == 7
        internals.give_id(message, "abc")
        reply = internals.error_reply(message, "it broke")
    assert message.metadata.message_id == "abc"
    assert (reply.error.reason, reply.metadata.reply_to_message_id) == ("it broke", "abc")


def test_flower_is_as_it_was_afterwards():
    before = Strategy.start, server_app.start_grid, Server.fit, LegacyContext.__init__
    with internals.collecting_results():
        assert Strategy.start is not before[0]

    def fail():
        with internals.collecting_results():
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (Strategy.start, server_app.start_grid, Server.fit, LegacyContext.__init__) == before


def test_what_a_strategy_returns_is_heard(monkeypatch):
    monkeypatch.setattr(Strategy, "start", lambda _self: internals.Result())
    with internals.collecting_results() as sources:
        returned = FedAvg().start()
    assert sources == [returned]


def test_ctrl_c_ends_a_strategy_with_what_it_has_and_one_that_has_nothing_as_ever(monkeypatch):
    def start(_self, arrays):
        result = strategy_module.Result(arrays=arrays)
        raise internals.Interrupted(result)

    monkeypatch.setattr(Strategy, "start", start)
    with internals.collecting_results():
        assert FedAvg().start(ArrayRecord([np.ones(2)])).arrays.to_numpy_ndarrays()[0].tolist() == [1, 1]
        with pytest.raises(KeyboardInterrupt):
            FedAvg().start(ArrayRecord())


def test_a_legacy_workflow_and_a_legacy_server_are_heard_of_with_their_model(monkeypatch):
    monkeypatch.setattr(Server, "fit", lambda *_arguments, **_options: (History(), 0.0))
    with internals.collecting_results() as sources:
        context = LegacyContext(Context(1, 0, {}, RecordDict(), {}))
        server = Server(client_manager=SimpleClientManager())
        server.fit(1, None)
    assert sources[0] is context
    assert sources[1] is context.history
    assert sources[2] is server
    assert internals.legacy_arrays(context) is None
    assert internals.legacy_arrays(server) is None
    server.parameters = ndarrays_to_parameters([np.arange(3), np.float32(2)])
    context.state[MAIN_PARAMS_RECORD] = ArrayRecord({"0": Array(data=b"tree", stype="", dtype="", shape=())})
    assert [array.tolist() for array in internals.legacy_arrays(server).to_numpy_ndarrays()] == [[0, 1, 2], 2.0]
    server.parameters = Parameters([b"tree"], "xgboost")
    for one in (server, context):
        assert bytes(internals.legacy_arrays(one).to_numpy_ndarrays()[0]) == b"tree"


def test_a_twin_has_metadata_of_its_own_and_an_arrays_twin_its_bytes():
    with internals.task_identity(1):
        message = Message(RecordDict(), 1000, "train")
    twin = internals.with_own_metadata(message)
    internals.give_id(twin, "twin")
    assert message.metadata.message_id != "twin"
    assert not internals.without_content(message).has_content()
    assert message.has_content()
    array = Array(np.arange(3))
    assert internals.twin_of(array).numpy().tolist() == [0, 1, 2]
