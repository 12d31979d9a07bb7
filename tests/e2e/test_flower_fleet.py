"""Flower apps, unmodified, on real agents: `edgefl run` over mutual TLS, and what is killed meanwhile."""

import json
import os
import signal
import textwrap
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from edgefl.flower import load_flower_app, run_flower_app
from edgefl.local_fleet import LocalFleet
from edgefl.trees import SpooledTree

EXAMPLES = Path(__file__).parents[2] / "examples"
PARTS = 3


@pytest.fixture(scope="module")
def agents(tmp_path_factory):
    """A cloud and three agents, for the tests that kill none of them."""
    with LocalFleet(tmp_path_factory.mktemp("fleet")) as fleet:
        fleet.start()
        for part in range(PARTS):
            start_agent(fleet, f"cam-{part}", part=part, parts=PARTS)
        for agent in fleet.agents.values():
            agent.wait_for("mqtt.up")
        yield fleet


def start_agent(fleet, name, **data):
    if not (fleet.folder / name).exists():
        fleet.enroll(name)
    options = [part for key, value in data.items() for part in ("--data", f"{key}={value}")]
    return fleet.start_agent(name, *options)


def run(fleet, app, *options):
    """Run an app to its end; return its JSON and its last arrays."""
    result, out = fleet.folder / "result.json", fleet.folder / "model.safetensors"
    fleet.command("run", app, "--cloud", fleet.url, *options, "--json", result, "--out", out, timeout_s=500)
    return json.loads(result.read_text()), SpooledTree(out)


KERAS = [
    pytest.mark.soak,
    pytest.mark.skipif(find_spec("tensorflow") is None, reason="needs TensorFlow: pip install '.[keras]'"),
]


@pytest.mark.parametrize(
    ("name", "rounds", "tolerance"),
    [
        ("sklearn-app", 3, 1e-6),
        pytest.param("flower-app", 1, 1e-5, marks=pytest.mark.soak),
        pytest.param("keras-app", 1, 1e-4, marks=KERAS),
    ],
)
def test_an_unmodified_app_gives_on_agents_what_it_gives_in_simulation(agents, name, rounds, tolerance):
    result, model = run(agents, EXAMPLES / name, "--rounds", rounds)
    simulated = run_flower_app(load_flower_app(EXAMPLES / name), PARTS, {"num-server-rounds": rounds}, workers=0)
    assert [one["admitted"] for one in result["rounds"]] == [PARTS] * rounds
    assert result["engine"] == "fleet"
    assert result["final"] == pytest.approx(simulated.final, abs=1e-4)
    arrays = simulated.arrays
    assert model.keys() == arrays.keys()
    for key in model:
        np.testing.assert_allclose(model[key], arrays[key].numpy(), atol=tolerance, rtol=0)


COUNTS_SERVER = """
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.serverapp import ServerApp

    app = ServerApp()

    @app.main()
    def main(grid, context):
        for turn in range(1, context.run_config["turns"] + 1):
            content = RecordDict({"ask": ConfigRecord({"turn": turn})})
            nodes = list(grid.get_node_ids()) if turn == 1 else nodes
            asked = [Message(content, node, "evaluate", group_id=str(turn)) for node in nodes]
            replies = list(grid.send_and_receive(asked, timeout=60))
            assert not any(reply.has_error() for reply in replies), replies
            assert len(replies) == len(nodes)
"""
COUNTS_CLIENT = """
    import time
    from pathlib import Path
    from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.evaluate()
    def count(message, context):
        calls = Path(context.node_config["calls"])
        with calls.open("a") as log:
            log.write(f"{message.content['ask']['turn']} ")
        if message.content["ask"]["turn"] == 3 and calls.with_suffix(".hang").exists():
            time.sleep(60)
        seen = context.state.config_records.get("seen", ConfigRecord({"n": 0}))["n"] + 1
        context.state["seen"] = ConfigRecord({"n": seen})
        return Message(RecordDict({"m": MetricRecord({"seen": seen})}), reply_to=message)
"""
PYPROJECT = """
[tool.flwr.app.components]
serverapp = "counts.server_app:app"
clientapp = "counts.client_app:app"
[tool.flwr.app.config]
turns = 3
"""


@pytest.fixture
def counts(tmp_path):
    """An app that asks each node in turns how often it was asked."""
    folder = tmp_path / "counts_app"
    (folder / "counts").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "counts" / "__init__.py").touch()
    (folder / "counts" / "server_app.py").write_text(textwrap.dedent(COUNTS_SERVER))
    (folder / "counts" / "client_app.py").write_text(textwrap.dedent(COUNTS_CLIENT))
    return folder


def wait_until(condition, timeout_s=120):
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.02)


def test_agents_and_cloud_are_killed_in_mid_exchange_and_every_message_counts_once(embedded_fleet, counts, tmp_path):
    fleet, data = embedded_fleet, {}
    for name in ("a", "b"):
        data[name] = {"calls": tmp_path / f"{name}.calls"}
        start_agent(fleet, name, **data[name]).wait_for("mqtt.up")
    hang, result = tmp_path / "b.hang", tmp_path / "result.json"
    hang.touch()
    runner = fleet.spawn("run.log", "run", counts, "--cloud", fleet.url, "--json", result)
    runner.wait_for("round 2")
    wait_until(lambda: "3" in data["b"]["calls"].read_text())  # b has its last message in hand; its state says 2
    fleet.agents["b"].kill()
    fleet.cloud.kill()
    hang.unlink()
    fleet.start_cloud()
    start_agent(fleet, "b", **data["b"])
    runner.popen.wait(60)
    assert runner.stop() == 0, runner.log.read_text()
    rounds = json.loads(result.read_text())["rounds"]
    assert [(one["admitted"], one["metrics"]["seen"]) for one in rounds] == [(2, 1), (2, 2), (2, 3)]
    assert data["a"]["calls"].read_text().split() == ["1", "2", "3"]
    assert data["b"]["calls"].read_text().split() == ["1", "2", "3", "3"]
    wait_until(lambda: not [file for name in data for file in (fleet.folder / name / "states").iterdir()], 10)


@pytest.mark.soak
def test_an_app_reaches_devices_below_regions_also_when_a_region_and_the_cloud_are_killed(
    builtin_fleet, counts, tmp_path
):
    fleet, data = builtin_fleet, {}
    fleet.start_region("r1")
    fleet.start_region("r2", parent="r1")
    for name, region in (("a", "r1"), ("b", "r2"), ("c", "")):  # below one region, below two, and at the cloud
        data[name] = {"calls": tmp_path / f"{name}.calls"}
        fleet.enroll(name, region=region)
        start_agent(fleet, name, **data[name]).wait_for("mqtt.up")
    hang, result = tmp_path / "b.hang", tmp_path / "result.json"
    hang.touch()
    runner = fleet.spawn("run.log", "run", counts, "--cloud", fleet.url, "--json", result)
    runner.wait_for("round 2")
    wait_until(lambda: "3" in data["b"]["calls"].read_text())
    fleet.agents["b"].kill()
    fleet.regions["r1"].kill()
    fleet.cloud.kill()
    hang.unlink()
    fleet.start_cloud()
    fleet.start_region("r1")
    start_agent(fleet, "b", **data["b"])
    runner.popen.wait(90)
    assert runner.stop() == 0, runner.log.read_text()
    rounds = json.loads(result.read_text())["rounds"]
    assert [(one["admitted"], one["metrics"]["seen"]) for one in rounds] == [(3, 1), (3, 2), (3, 3)]
    assert [data[name]["calls"].read_text().split() for name in "ac"] == [["1", "2", "3"]] * 2
    assert data["b"]["calls"].read_text().split() == ["1", "2", "3", "3"]
    wait_until(lambda: not [file for name in data for file in (fleet.folder / name / "states").iterdir()], 60)


def test_ctrl_c_ends_the_run_and_frees_the_devices(embedded_fleet, counts, tmp_path):
    fleet, calls = embedded_fleet, tmp_path / "a.calls"
    start_agent(fleet, "a", calls=calls).wait_for("mqtt.up")
    calls.with_suffix(".hang").touch()
    runner = fleet.spawn("run.log", "run", counts, "--cloud", fleet.url)
    wait_until(lambda: calls.exists() and "3" in calls.read_text())
    os.kill(runner.pid, signal.SIGINT)
    runner.popen.wait(30)
    assert runner.stop() == 130, runner.log.read_text()
    assert "interrupted in" in runner.log.read_text()
    fleet.agents["a"].wait_for("round.cancelled")
    [job] = json.loads(fleet.command("jobs", "list", "--json", "-"))
    assert (job["kind"], job["state"]) == ("relay", "cancelled")


PUSHES_SERVER = """
    import time
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.common import log
    from flwr.serverapp import ServerApp

    app = ServerApp()

    @app.main()
    def main(grid, context):
        nodes = list(grid.get_node_ids())
        for turn in (1, 2):
            content = RecordDict({"ask": ConfigRecord({"turn": turn, "none": [], "empty": ""})})
            grid.push_messages([Message(content, node, "train.step") for node in nodes])
        asked = [Message(RecordDict(), node, "query") for node in nodes]
        log(20, "seen %s", sorted(one.content["a"]["n"] for one in grid.send_and_receive(asked)))
        content = RecordDict({"ask": ConfigRecord({"turn": 7})})
        grid.push_messages([Message(content, node, "train.step") for node in nodes])
        print("from the app")
"""
PUSHES_CLIENT = """
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train("step")
    def step(message, context):
        before = context.state.get("a", ConfigRecord({"n": 0}))["n"]
        context.state["a"] = ConfigRecord({"n": 10 * before + message.content["ask"]["turn"]})
        return Message(RecordDict(), reply_to=message)

    @app.query()
    def query(message, context):
        return Message(RecordDict({"a": context.state["a"]}), reply_to=message)
"""


def test_what_is_pushed_and_never_pulled_runs_in_order_and_before_the_end(agents, counts):
    (counts / "counts" / "server_app.py").write_text(textwrap.dedent(PUSHES_SERVER))
    (counts / "counts" / "client_app.py").write_text(textwrap.dedent(PUSHES_CLIENT))
    runner = agents.spawn("pushes.log", "run", counts, "--cloud", agents.url, "--json", "-")
    runner.popen.wait(90)
    log = runner.log.read_text()
    assert runner.stop() == 0, log
    assert "seen [12, 12, 12]" in log
    result = json.loads(log[log.index("\n{\n") :])
    assert [(one["admitted"], one["failed"], one["missing"]) for one in result["rounds"]] == [(PARTS, 0, 0)] * 3


RAISES = """
    from flwr.clientapp import ClientApp
    app = ClientApp()

    @app.evaluate()
    def evaluate(message, context):
        raise ValueError("no data on this device")
"""


def test_what_goes_wrong_is_said_and_fails(agents, counts):
    (counts / "counts" / "client_app.py").write_text(textwrap.dedent(RAISES))
    for settings, said in (
        (("--set", "turn=1"), "has no run-config key 'turn'; known: turns"),
        ((), "ValueError: no data on this device"),
    ):
        runner = agents.spawn("bad.log", "run", counts, "--cloud", agents.url, *settings)
        runner.popen.wait(60)
        assert runner.stop() == 1
        assert said in runner.log.read_text()
