"""Whole apps on our engine: what Flower promises an app, it gets, and by hand it comes out the same."""

import logging

import flwr.serverapp.strategy
import numpy as np
import pytest
from flwr.serverapp import server_app
from flwr.supercore.task_identity import TaskIdentity

from edgefl.errors import ConfigError, QuorumNotMet, TaskError
from edgefl.flower import load_flower_app, run_flower_app

IMPORTS = """
    import numpy as np
    from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import *
"""
ASKS = (  # a ServerApp that sends each node a query and keeps what comes back
    IMPORTS
    + """
    app = ServerApp()

    @app.main()
    def main(grid, context):
        for turn in range(context.run_config["rounds"]):
            asked = [Message(RecordDict({"c": ConfigRecord({"turn": turn})}), n, KIND) for n in grid.get_node_ids()]
            for place, reply in enumerate(grid.send_and_receive(asked)):
                if reply.has_error():
                    context.state[f"{turn}-{place}"] = ConfigRecord(
                        {"code": reply.error.code, "why": reply.error.reason})
                else:
                    context.state[f"{turn}-{place}"] = reply.content["answer"]
"""
)


def run(folder, nodes=2, **config):
    sources = []
    result = run_flower_app(load_flower_app(folder), nodes, config, on_round=sources.append)
    assert [one.round for one in sources] == [one.round for one in result.rounds]
    return result


def asks(kind="query"):
    return ASKS.replace("KIND", repr(kind))


def test_fedavg_by_hand(make_app):
    result = run(make_app())
    # Partitions 0 and 1 add 1 and 2 with weights 1 and 2: each round adds 5/3.
    np.testing.assert_allclose(result.arrays.to_numpy_ndarrays()[0], [10 / 3] * 2)
    assert [one.metrics["value"] for one in result.rounds] == pytest.approx([5 / 3, 10 / 3])
    assert result.final == pytest.approx({"value": 10 / 3, "train_loss": 2 / 3})


def test_the_result_has_the_keys_of_every_engine(make_app):
    told = run(make_app()).as_json()
    assert told["engine"] == "flower"
    assert {"rounds", "final", "seconds", "clients_per_second", "peak_rss_mb", "model"} <= told.keys()
    first = told["rounds"][0]
    assert (first["admitted"], first["rejected"], first["failed"], first["missing"]) == (2, 0, 0, 0)
    assert first["down_bytes"] > first["up_bytes"] > 0
    assert 0 < told["clients_per_second"] == pytest.approx(4 / told["seconds"])


def test_run_config_overrides_reach_server_and_client(make_app):
    client = asks_client("""ConfigRecord({"rate": context.run_config["nested.rate"]})""")
    result = run(make_app(asks(), client), rounds=1, **{"nested.rate": 0.25})
    assert [dict(record) for record in result.state.values()] == [{"rate": 0.25}] * 2


def asks_client(answer, before="", kind="query"):
    return (
        IMPORTS
        + f"""
    app = ClientApp()

    @app.{kind}()
    def answer(message, context):
        {before}
        return Message(RecordDict({{"answer": {answer}}}), reply_to=message)
"""
    )


def test_state_stays_with_its_node_over_the_rounds(make_app):
    before = """seen = context.state.get("seen", ConfigRecord({"turns": []}))
        seen["turns"] = [*seen["turns"], message.content["c"]["turn"] * 10 + context.node_config["partition-id"]]
        context.state["seen"] = seen"""
    result = run(make_app(asks(), asks_client("seen", before)), rounds=3)
    assert result.state["2-0"]["turns"] == [0, 10, 20]
    assert result.state["2-1"]["turns"] == [1, 11, 21]


def test_a_node_that_fails_keeps_the_state_it_had(make_app):
    before = """if message.content["c"]["turn"] == 1:
            context.state["bad"] = ConfigRecord({"x": 1})
            raise RuntimeError("no")"""
    answer = 'ConfigRecord({"bad": "bad" in context.state})'
    result = run(make_app(asks(), asks_client(answer, before)), nodes=1, rounds=3)
    assert result.state["1-0"]["code"] == 2
    assert result.state["2-0"]["bad"] is False


def test_clients_share_nothing_that_can_change(make_app):
    server = (
        IMPORTS
        + """
    app = ServerApp()

    @app.main()
    def main(grid, context):
        content = RecordDict({"c": ConfigRecord({"list": [1]})})
        replies = grid.send_and_receive([Message(content, node, "query") for node in grid.get_node_ids()])
        context.state["lengths"] = ConfigRecord({"n": [reply.content["answer"]["n"] for reply in replies]})
        context.state["mine"] = ConfigRecord({"n": len(content["c"]["list"])})
"""
    )
    before = 'message.content["c"]["list"].append(2)'
    result = run(
        make_app(server, asks_client('ConfigRecord({"n": len(message.content["c"]["list"])})', before)), nodes=3
    )
    assert result.state["lengths"]["n"] == [2, 2, 2]
    assert result.state["mine"]["n"] == 1


def test_actions_reach_their_functions_and_a_wrong_one_is_an_error(make_app):
    client = asks_client('ConfigRecord({"x": 1})').replace("app.query()", "app.query('names')")
    assert run(make_app(asks("query.names"), client), rounds=1).state["0-1"]["x"] == 1
    failed = run(make_app(asks("query.other"), client, name="wrong"), rounds=1).state["0-0"]
    assert failed["code"] == 2
    assert "No query function registered with name 'other'" in failed["why"]


def test_mods_wrap_the_client_from_outside_in(make_app):
    client = (
        asks_client('ConfigRecord({"seen": message.content["c"]["mods"]})')
        .replace(
            "app = ClientApp()",
            """
    def named(name):
        def mod(message, context, call_next):
            message.content["c"]["mods"] = [*message.content["c"].get("mods", []), name]
            reply = call_next(message, context)
            reply.content["answer"]["seen"] = [*reply.content["answer"]["seen"], name]
            return reply
        return mod

    app = ClientApp(mods=[named("outer")])""",
        )
        .replace("app.query()", "app.query(mods=[named('inner')])")
    )
    assert run(make_app(asks(), client), rounds=1).state["0-0"]["seen"] == ["outer", "inner", "inner", "outer"]


def test_flowers_own_mods_run(make_app):
    client = """
    from flwr.clientapp.mod import arrays_size_mod, message_size_mod
    """ + asks_client('ConfigRecord({"x": 1})').replace(
        "ClientApp()", "ClientApp(mods=[message_size_mod, arrays_size_mod])"
    )
    assert run(make_app(asks(), client), rounds=1).state["0-0"]["x"] == 1


def test_lifespans_surround_server_and_clients(make_app):
    life = """
    @app.lifespan()
    def lifespan(context):
        context.state["life"] = ConfigRecord({"steps": ["enter"]})
        yield
        context.state["life"]["steps"] = [*context.state["life"]["steps"], "leave"]
"""
    client = asks_client('context.state["life"]').replace("    @app.query", life + "\n    @app.query")
    result = run(make_app(asks() + life, client), nodes=1, rounds=2)
    assert result.state["life"]["steps"] == ["enter", "leave"]
    assert result.state["1-0"]["steps"] == ["enter", "leave"]  # the record itself was the answer


def test_a_failing_client_is_reported_with_file_and_line_and_the_round_goes_on(make_app, adder_client):
    client = adder_client.replace(
        "    arrays =", "    if part == 1:\n            raise ValueError('out of paint')\n        arrays ="
    )
    result = run(make_app(client=client))
    first = result.rounds[0]
    assert (first.admitted, first.failed, list(first.reasons)) == (1, 1, ["partition-1"])
    assert "ValueError: out of paint" in first.reasons["partition-1"]
    assert "client_app.py:" in first.reasons["partition-1"]
    np.testing.assert_allclose(result.arrays.to_numpy_ndarrays()[0], [2, 2])  # partition 0 alone


def test_a_run_in_which_all_training_failed_raises(make_app, adder_client):
    client = adder_client.replace("    arrays =", "    raise SystemExit(3)\n        arrays =")
    with pytest.raises(QuorumNotMet, match=r"every client failed, in every round\. partition-\d: .*SystemExit"):
        run(make_app(client=client))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("return 5", "returned a int, not a Message"),
        ("return message", "no reply to the one it got"),
        ("context.run_config['rounds'] = 7", "`run_config` field .* cannot be modified"),
    ],
)
def test_what_a_client_must_not_do_is_an_error(make_app, answer, said):
    result = run(make_app(asks(), asks_client('ConfigRecord({"x": 1})', answer)), rounds=1)
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(result.state["0-0"]["why"])


def test_an_error_of_the_server_names_file_and_line(make_app):
    folder = make_app(asks().replace("for turn", "raise KeyError('x')\n        for turn"))
    with pytest.raises(TaskError, match=r"Flower app 'adder': its ServerApp raised KeyError.*server_app\.py:\d+\)"):
        run(folder)


def test_flower_is_left_as_it_was(make_app):
    start, level = flwr.serverapp.strategy.Strategy.start, logging.getLogger("flwr").level
    run(make_app())
    assert flwr.serverapp.strategy.Strategy.start is start
    assert logging.getLogger("flwr").level == level
    assert server_app.start_grid.__module__ == "flwr.server.compat.app"
    assert not hasattr(server_app.start_grid, "__wrapped__")
    with pytest.raises(RuntimeError):
        _ = TaskIdentity.run_id


def test_a_federation_needs_a_node(make_app):
    with pytest.raises(ConfigError, match="1 node or more, not 0"):
        run(make_app(), nodes=0)


def test_a_million_nodes_cost_nothing_until_they_are_asked(make_app):
    server = asks().replace("grid.get_node_ids()", "list(grid.get_node_ids())[-2:]")
    client = asks_client('ConfigRecord({"p": context.node_config["partition-id"]})')
    result = run(make_app(server, client), nodes=1_000_000, rounds=1)
    assert [record["p"] for record in result.state.values()] == [999_998, 999_999]


def test_pushed_messages_are_executed_whether_or_not_their_replies_are_read(make_app):
    server = (
        IMPORTS
        + """
    app = ServerApp()

    @app.main()
    def main(grid, context):
        ask = lambda: [Message(RecordDict({"c": ConfigRecord({})}), node, "query") for node in grid.get_node_ids()]
        grid.send_and_receive(ask())
        ids = grid.push_messages(ask())
        replies = list(grid.pull_messages(ids))
        context.state["counts"] = ConfigRecord({
            "n": [reply.content["answer"]["n"] for reply in replies],
            "again": len(list(grid.pull_messages(ids))),
        })
"""
    )
    before = """count = context.state.get("count", ConfigRecord({"n": 0}))
        context.state["count"] = ConfigRecord({"n": count["n"] + 1})"""
    result = run(make_app(server, asks_client('context.state["count"]', before)), nodes=2)
    assert dict(result.state["counts"]) == {"n": [2, 2], "again": 0}


LEGACY_SERVER = (
    IMPORTS
    + """
    from flwr.common import ndarrays_to_parameters
    from flwr.server import ServerAppComponents, ServerConfig
    from flwr.server.strategy import FedAvg

    def mean(metrics):
        return {"value": sum(n * one["value"] for n, one in metrics) / sum(n for n, _ in metrics)}

    def server_fn(context):
        strategy = FedAvg(
            initial_parameters=ndarrays_to_parameters([np.zeros(2)]),
            evaluate_metrics_aggregation_fn=mean,
            evaluate_fn=lambda turn, arrays, config: (float(arrays[0][0]), {"first": float(arrays[0][0])}),
        )
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=context.run_config["rounds"]))

    app = ServerApp(server_fn=server_fn)
"""
)
LEGACY_CLIENT = (
    IMPORTS
    + """
    from flwr.client import NumPyClient

    class Adder(NumPyClient):
        def __init__(self, part):
            self.part = part

        def fit(self, parameters, config):
            return [array + 1 + self.part for array in parameters], 1 + self.part, {}

        def evaluate(self, parameters, config):
            return 0.5, 1, {"value": float(parameters[0][0])}

    def client_fn(context):
        return Adder(context.node_config["partition-id"]).to_client()

    app = ClientApp(client_fn=client_fn)
"""
)


def test_a_legacy_app_by_hand(make_app):
    result = run(make_app(LEGACY_SERVER, LEGACY_CLIENT))
    assert [one.admitted for one in result.rounds] == [2, 2]
    assert result.final == pytest.approx({"loss": 10 / 3, "first": 10 / 3, "clients_loss": 0.5, "value": 10 / 3})


STRATEGIES = {
    "FedAvgM": "FedAvgM()", "FedAdagrad": "FedAdagrad()", "FedAdam": "FedAdam()", "FedYogi": "FedYogi()",
    "FedMedian": "FedMedian()", "FedTrimmedAvg": "FedTrimmedAvg()", "FedProx": "FedProx(proximal_mu=0.1)",
    "QFedAvg": "QFedAvg(client_learning_rate=0.1)", "Krum": "Krum(num_malicious_nodes=1)",
    "MultiKrum": "MultiKrum(num_malicious_nodes=1, num_nodes_to_select=2)", "Bulyan": "Bulyan(num_malicious_nodes=1)",
}  # fmt: skip


@pytest.mark.parametrize("made", STRATEGIES.values(), ids=STRATEGIES)
def test_flowers_strategies_run(make_app, adder_client, made):
    server = (
        IMPORTS
        + f"""
    app = ServerApp()

    @app.main()
    def main(grid, context):
        {made}.start(grid=grid, initial_arrays=ArrayRecord([np.ones(2)]), num_rounds=1)
"""
    )
    client = adder_client.replace('"train_loss": float(part)', '"loss": 0.5, "train_loss": float(part)')
    result = run(make_app(server, client), nodes=7)
    assert result.rounds[0].admitted == 7
    assert result.arrays.to_numpy_ndarrays()[0].shape == (2,)
    assert np.isfinite(result.arrays.to_numpy_ndarrays()[0]).all()


CTRL_C = "if float({arrays}[0][0]) > 0: import signal; signal.raise_signal(signal.SIGINT)"  # in round 2


def test_ctrl_c_ends_the_round_with_who_answered_and_no_other_begins(make_app, adder_client):
    pressed = CTRL_C.format(arrays='message.content["arrays"].to_numpy_ndarrays()')
    client = adder_client.replace("def train(message, context):", f"def train(message, context):\n        {pressed}")
    result = run_flower_app(load_flower_app(make_app(client=client)), 3, {"rounds": 50}, workers=0)
    assert result.interrupted
    assert [one.admitted for one in result.rounds] == [3, 1]
    assert [one.missing for one in result.rounds] == [0, 2]
    assert sorted(result.took_part.tolist()) == [1, 1, 2]
    # Round 1 adds (1*1 + 2*2 + 3*3) / 6, the cut round 2 the 1, 2 or 3 of whoever was first.
    added = result.arrays.to_numpy_ndarrays()[0] - 14 / 6
    np.testing.assert_allclose(added, result.took_part.argmax() + 1)


def test_ctrl_c_in_a_legacy_app(make_app):
    fit = "def fit(self, parameters, config):"
    client = LEGACY_CLIENT.replace(fit, f"{fit}\n            {CTRL_C.format(arrays='parameters')}")
    result = run_flower_app(load_flower_app(make_app(LEGACY_SERVER, client)), 2, {"rounds": 50}, workers=0)
    assert result.interrupted
    assert 2 <= len(result.rounds) <= 3  # its clients run in threads, and the main thread hears signals
    assert result.rounds[0].metrics["first"] == pytest.approx(5 / 3)  # what the server alone had seen


def test_a_second_ctrl_c_ends_the_run_at_once(make_app):
    server = (
        IMPORTS
        + """
    import signal
    app = ServerApp()

    @app.main()
    def main(grid, context):
        FedAvg().start(grid=grid, initial_arrays=ArrayRecord([np.zeros(2)]), num_rounds=1)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise RuntimeError("not reached")
"""
    )
    result = run_flower_app(load_flower_app(make_app(server)), 2, workers=0)
    assert (result.interrupted, [one.admitted for one in result.rounds]) == (True, [2])
