"""What an app may count on in Flower, it may count on here: in simulation, and (by played devices) on a fleet."""

import operator
import random

import numpy as np
import pytest

from edgefl.errors import EdgeflError, QuorumNotMet, TaskError
from edgefl.flower import load_flower_app, run_flower_app
from edgefl.trees import SpooledTree

IMPORTS = """
    import numpy as np
    from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
"""
PUSHES = (  # as a vertical federation: gradients are pushed, and their replies not looked at
    IMPORTS
    + """
    app = ServerApp()

    @app.main()
    def main(grid, context):
        for turn in range(1, context.run_config["rounds"] + 1):
            asked = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
            replies = list(grid.send_and_receive(asked))
            context.state[str(turn)] = ConfigRecord({"seen": sorted(one.content["a"]["n"] for one in replies)})
            step = RecordDict({"g": ConfigRecord({"turn": turn, "none": [], "empty": "", "bytes": b""})})
            grid.push_messages([Message(step, node, "train.step") for node in grid.get_node_ids()])
"""
)
STEPS = (
    IMPORTS
    + """
    app = ClientApp()

    @app.query()
    def query(message, context):
        return Message(RecordDict({"a": context.state.get("n", ConfigRecord({"n": 0}))}), reply_to=message)

    @app.train("step")
    def step(message, context):
        n = context.state.get("n", ConfigRecord({"n": 0}))["n"]
        context.state["n"] = ConfigRecord({"n": n + message.content["g"]["turn"]})
        return Message(RecordDict(), reply_to=message)
"""
)
DEFAULT_WORKFLOW = """
    import numpy as np
    from flwr.common import ndarrays_to_parameters
    from flwr.server import LegacyContext, ServerApp, ServerConfig
    from flwr.server.strategy import FedAvg
    from flwr.server.workflow import DefaultWorkflow

    app = ServerApp()

    @app.main()
    def main(grid, context):
        strategy = FedAvg(
            initial_parameters=ndarrays_to_parameters([np.zeros(2)]),
            evaluate_metrics_aggregation_fn=lambda all: {"value": sum(n * m["value"] for n, m in all) / len(all)},
        )
        rounds = context.run_config["rounds"]
        DefaultWorkflow()(grid, LegacyContext(context, ServerConfig(num_rounds=rounds), strategy))
"""
NUMPY_CLIENT = """
    from flwr.client import ClientApp, NumPyClient

    class Client(NumPyClient):
        def __init__(self, part):
            self.part = part

        def fit(self, parameters, config):
            return [array + 1 + self.part for array in parameters], 1, {}

        def evaluate(self, parameters, config):
            return float(parameters[0][0]), 1, {"value": float(parameters[0][1])}

    app = ClientApp(client_fn=lambda context: Client(int(context.node_config["partition-id"])).to_client())
"""


SECURE = DEFAULT_WORKFLOW.replace(
    "DefaultWorkflow()", "DefaultWorkflow(SecAggPlusWorkflow(3, 2, clipping_range=20.0, max_weight=10))"
).replace("import DefaultWorkflow", "import DefaultWorkflow, SecAggPlusWorkflow")
SECURE_CLIENT = NUMPY_CLIENT.replace("to_client())", "to_client(), mods=[secaggplus_mod])").replace(
    "from flwr.client import", "from flwr.client.mod import secaggplus_mod\n    from flwr.client import"
)


@pytest.fixture(params=["loop", "pool", "fleet"])
def anywhere(request, make_app):
    """Run an app's parts with so many nodes, in each place that we run apps in."""
    on_fleet = request.getfixturevalue("on_fleet") if request.param == "fleet" else None

    def run(server, client, rounds, nodes=2, **options):
        folder = make_app(server, client)
        if on_fleet is not None:
            return on_fleet(folder, *(f"cam-{part}" for part in range(nodes)), config={"rounds": rounds}, **options)
        workers = {"loop": 0, "pool": 2}[request.param]
        return run_flower_app(load_flower_app(folder), nodes, {"rounds": rounds}, workers=workers, **options)

    return run


def test_what_is_pushed_and_never_pulled_runs_in_order_the_last_of_it_too(anywhere):
    heard = []
    result = anywhere(PUSHES, STEPS, 3, on_round=heard.append)
    assert [result.state[str(turn)]["seen"] for turn in (1, 2, 3)] == [[0, 0], [1, 1], [3, 3]]
    assert [one.admitted for one in result.rounds] == [one.admitted for one in heard] == [2, 2, 2]


def test_training_that_nobody_answers_is_no_success(anywhere):
    with pytest.raises(QuorumNotMet, match=r"every client failed, in every round\. .*KeyError"):
        anywhere(PUSHES, STEPS.replace('"g"]["turn"]', '"g"]["gone"]'), 1)


def test_an_app_that_trips_over_its_clients_failure_is_told_with_the_reason_first(anywhere):
    server = PUSHES.replace("grid.push_messages(", "_ = list(grid.send_and_receive(").replace(
        'node, "train.step") for node in grid.get_node_ids()])',
        'node, "train.step") for node in grid.get_node_ids()]))[0].content["a"]',
    )
    with pytest.raises(
        QuorumNotMet, match=r"every client failed.*KeyError: 'gone'.*After that: .*its ServerApp raised"
    ):
        anywhere(server, STEPS.replace('"g"]["turn"]', '"g"]["gone"]'), 1)


def test_an_app_that_trips_over_failed_queries_is_told_with_their_reasons(anywhere):
    with pytest.raises(TaskError, match=r"its ServerApp raised.*Clients had failed before: .*ValueError: no data here"):
        anywhere(
            PUSHES, STEPS.replace("return Message", "raise ValueError('no data here')\n        return Message", 1), 1
        )


def test_a_legacy_workflows_history_and_model_are_its_result(anywhere, tmp_path):
    result = anywhere(DEFAULT_WORKFLOW, NUMPY_CLIENT, 2, out=tmp_path / "m.safetensors")
    assert [one.metrics for one in result.rounds] == [{"loss": 1.5, "value": 1.5}, {"loss": 3.0, "value": 3.0}]
    assert result.final == {"loss": 3.0, "value": 3.0}
    assert SpooledTree(tmp_path / "m.safetensors")["0"].tolist() == [3, 3]


def test_secure_aggregation_gives_the_mean_that_it_hides(anywhere, tmp_path):
    result = anywhere(SECURE, SECURE_CLIENT, 2, nodes=3, out=tmp_path / "m.safetensors")
    assert [one.admitted for one in result.rounds] == [3, 3]
    # Three clients add 1, 2 and 3 in each of two rounds; 40 / 2**22 is a step of the quantisation.
    np.testing.assert_allclose(SpooledTree(tmp_path / "m.safetensors")["0"], [4, 4], atol=1e-4)
    assert result.final["loss"] == pytest.approx(4, abs=1e-4)


def test_secure_aggregation_goes_on_without_a_client_that_leaves_in_its_midst(anywhere, tmp_path):
    leaves = SECURE_CLIENT.replace(
        "return [", "if self.part == 0:\n                raise OSError('unplugged')\n            return [", 1
    )
    result = anywhere(SECURE, leaves, 2, nodes=3, out=tmp_path / "m.safetensors")
    assert [(one.admitted, one.failed, one.missing) for one in result.rounds] == [(2, 1, 0)] * 2
    np.testing.assert_allclose(
        SpooledTree(tmp_path / "m.safetensors")["0"], [5, 5], atol=1e-3
    )  # 2.5 a round, rounded at random


DRAWS = (  # between its clients' messages
    IMPORTS
    + """
    import random
    app = ServerApp()

    @app.main()
    def main(grid, context):
        drawn, heard = [], []
        for turn in range(context.run_config["rounds"]):
            drawn += [random.random(), np.random.normal()]
            asked = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
            heard += [one.content["a"]["drawn"] for one in grid.send_and_receive(asked)]
        context.state["seen"] = MetricRecord({"server": drawn, "clients": heard})
"""
)
DRAWING_CLIENT = (
    IMPORTS
    + """
    import random
    SEED
    app = ClientApp()

    @app.query()
    def query(message, context):
        drawn = MetricRecord({"drawn": random.random() + np.random.normal()})
        return Message(RecordDict({"a": drawn}), reply_to=message)
"""
)
IN_ITS_PROCESS = (0, 1)  # as `workers`: with the ServerApp, or without it


@pytest.mark.parametrize("workers", IN_ITS_PROCESS)
def test_what_clients_draw_and_seed_changes_nothing_that_the_server_draws(make_app, workers):
    seed = "random.seed(7); np.random.seed(7)"
    server = DRAWS.replace("drawn, heard =", f"{seed}; drawn, heard =")
    client = DRAWING_CLIENT.replace("SEED", "").replace("drawn =", f"{seed}; drawn =")
    result = run_flower_app(load_flower_app(make_app(server, client)), 2, {"rounds": 2}, workers=workers)
    python, legacy = random.Random(7), np.random.RandomState(7)
    first = [python.random(), legacy.normal()]
    assert result.state["seen"]["server"] == [*first, python.random(), legacy.normal()]
    assert result.state["seen"]["clients"] == [sum(first)] * 4


@pytest.mark.parametrize("workers", IN_ITS_PROCESS)
def test_clients_of_an_app_that_seeds_as_it_is_imported_begin_with_that_seed(make_app, workers):
    client = DRAWING_CLIENT.replace("SEED", "random.seed(7); np.random.seed(7)")
    result = run_flower_app(load_flower_app(make_app(DRAWS, client)), 1, {"rounds": 3}, workers=workers)
    python, legacy = random.Random(7), np.random.RandomState(7)
    assert result.state["seen"]["clients"] == [python.random() + legacy.normal() for _ in range(3)]


def test_clients_in_the_servers_process_do_not_draw_what_it_draws(make_app):
    app = load_flower_app(make_app(DRAWS, DRAWING_CLIENT.replace("SEED", "")))
    seen = run_flower_app(app, 1, {"rounds": 3}, workers=0).state["seen"]
    server = np.reshape(seen["server"], (3, 2)).sum(1)
    assert not set(seen["clients"]) & set(server)


def test_who_answers_too_late_leaves_no_success(make_app, adder_client):
    server = (
        IMPORTS
        + """
    app = ServerApp()

    @app.main()
    def main(grid, context):
        FedAvg().start(grid=grid, initial_arrays=ArrayRecord([np.zeros(2)]), num_rounds=1, timeout=0.05)
"""
    )
    slow = adder_client.replace("part = context", "import time; time.sleep(0.1)\n        part = context")
    with pytest.raises(QuorumNotMet, match="none of its 2 train messages was answered in time"):
        run_flower_app(load_flower_app(make_app(server, slow)), 2, workers=0)


def test_what_is_of_use_to_us_alone_cannot_end_a_run(make_app, monkeypatch):
    def broken(*_arguments):
        raise IndexError("list index out of range")

    folder = make_app()
    expected = run_flower_app(load_flower_app(folder), 2, workers=0)
    monkeypatch.setattr("edgefl.flower.tracker.message_bytes", broken)
    result = run_flower_app(load_flower_app(folder), 2, workers=0, on_round=broken)
    np.testing.assert_array_equal(result.arrays.to_numpy_ndarrays(), expected.arrays.to_numpy_ndarrays())
    assert result.final == expected.final
    assert [one.admitted for one in result.rounds] == [2, 2]


def test_a_fault_of_ours_that_ends_a_run_is_told_as_ours(make_app, monkeypatch):
    app = load_flower_app(make_app())
    monkeypatch.setattr("edgefl.flower.grid.copy_records", operator.methodcaller("no_such_method"))
    with pytest.raises(EdgeflError, match=r"a fault of edgefl itself, not of adder: AttributeError.*grid\.py:\d+"):
        run_flower_app(app, 2, workers=0)


def test_after_ctrl_c_the_app_itself_keeps_what_its_strategy_has(make_app, adder_client, tmp_path):
    server = (
        IMPORTS
        + f"""
    app = ServerApp()

    @app.main()
    def main(grid, context):
        result = FedAvg().start(grid=grid, initial_arrays=ArrayRecord([np.zeros(2)]), num_rounds=50)
        np.save({str(tmp_path / "own.npy")!r}, result.arrays.to_numpy_ndarrays()[0])
"""
    )
    pressed = """if float(message.content["arrays"].to_numpy_ndarrays()[0][0]) > 0:
            import signal; signal.raise_signal(signal.SIGINT)
        """
    client = adder_client.replace("part = context", f"{pressed}part = context", 1)
    out = tmp_path / "m.safetensors"
    result = run_flower_app(load_flower_app(make_app(server, client)), 2, workers=0, out=out)
    assert result.interrupted
    assert len(result.rounds) == 2
    kept = np.load(tmp_path / "own.npy")
    assert kept[0] > 5 / 3  # the first round's, and who answered in the second
    np.testing.assert_array_equal(SpooledTree(out)["0"], kept)


def test_a_server_app_that_fails_leaves_the_model_that_there_was(make_app, tmp_path):
    server = (
        IMPORTS
        + """
    app = ServerApp()

    @app.main()
    def main(grid, context):
        FedAvg().start(grid=grid, initial_arrays=ArrayRecord([np.zeros(2)]), num_rounds=1)
        raise OSError("no space to write the report")
"""
    )
    with pytest.raises(EdgeflError, match="no space to write the report"):
        run_flower_app(load_flower_app(make_app(server)), 2, workers=0, out=tmp_path / "m.safetensors")
    np.testing.assert_allclose(SpooledTree(tmp_path / "m.safetensors")["0"], [5 / 3] * 2)
