"""`edgefl simulate` of a folder with [tool.flwr.app]."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgefl.app.commands.simulate import simulate
from edgefl.errors import ConfigError
from edgefl.trees import SpooledTree

APP = Path(__file__).parents[4] / "examples" / "flower-app"


SERVER = """
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.serverapp import ServerApp
    app = ServerApp()

    @app.main()
    def main(grid, context):
        print("from the app")
        asked = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
        for reply in grid.send_and_receive(asked):
            print("heard", dict(reply.content["a"]), context.run_config["rounds"], context.run_config["nested.rate"])
"""
CLIENT = """
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.clientapp import ClientApp
    app = ClientApp()

    @app.query()
    def query(message, context):
        print("from a client")
        return Message(RecordDict({"a": ConfigRecord(dict(context.node_config))}), reply_to=message)
"""


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Flower's home: an empty one."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    return tmp_path / "config.toml"


@pytest.fixture
def says(make_app):
    """Run an app that prints what it sees; returns its lines."""
    folder = make_app(SERVER, CLIENT)

    def run(*arguments):
        done = CliRunner().invoke(simulate, [str(folder), *map(str, arguments)], catch_exceptions=False)
        return [line for line in done.output.splitlines() if line.startswith("heard")]

    return run


def invoke(*arguments):
    return CliRunner().invoke(simulate, [str(APP), *map(str, arguments)], catch_exceptions=False)


def test_an_unmodified_app_runs_and_is_drawn(tmp_path):
    done = invoke(
        "--clients", 3, "--rounds", 2, "--engine", "loop", "--set", "batch-size=32",
        "--json", tmp_path / "a.json", "--plot", tmp_path / "a.png",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    said = json.loads((tmp_path / "a.json").read_text())
    assert [one["admitted"] for one in said["rounds"]] == [3, 3]
    assert "round 2/2: 3 admitted" in done.output
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--engine", "stacked"), "'stacked' cannot run a Flower app"),
        (("--config", "a.toml"), "--config: not for a Flower app; .* with --run-config FILE.toml"),
        (("--data", "partition-id=3"), "partition-id of a simulated node is its position"),
        (("--federation-config", "nodes=3"), "there is no 'nodes'; known: num-supernodes"),
        (("--set", "no-such-key=1"), "no-such-key"),
    ],
)
def test_what_an_app_cannot_take_is_refused(flags, reason):
    with pytest.raises(ConfigError, match=reason):
        invoke(*flags)


def test_an_app_has_two_nodes_unless_somebody_says_otherwise_the_nearest_first(says, home):
    assert len(says()) == 2
    home.write_text('[superlink]\ndefault = "local"\n[superlink.local]\noptions.num-supernodes = 3\n')
    assert len(says()) == 3
    assert len(says("--federation-config", "num-supernodes=4")) == 4
    assert len(says("--federation-config", "num-supernodes=4", "--clients", 5)) == 5


def test_flowers_words_for_the_run_config_are_taken_ours_over_them(says, tmp_path):
    [line, _] = says("--run-config", "rounds=7 nested.rate=0.125", "--set", "rounds=8", "--data", "site=a")
    assert line == "heard {'site': 'a', 'partition-id': 0, 'num-partitions': 2} 8 0.125"
    (tmp_path / "over.toml").write_text("[nested]\nrate = 2.5\n")
    assert says("--run-config", tmp_path / "over.toml")[0].endswith(" 2 2.5")


@pytest.mark.parametrize("engine", ["loop", "pool"])
def test_json_on_stdout_is_alone_there_whatever_the_app_prints(make_app, engine):
    command = [sys.executable, "-m", "edgefl", "simulate", str(make_app(SERVER, CLIENT)), "--engine", engine]
    done = subprocess.run([*command, "--json", "-"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["engine"] == "flower"
    assert done.stderr.count("from the app") == 1
    assert done.stderr.count("from a client") == 2


def test_the_model_is_written_or_its_absence_told(make_app, tmp_path):
    out = tmp_path / "model.safetensors"
    for folder, there in ((make_app(), True), (make_app(SERVER, CLIENT, name="own"), False)):
        done = CliRunner().invoke(simulate, [str(folder), "--out", str(out)], catch_exceptions=False)
        assert (f"model: {out}" in done.output, out.exists()) == (there, there)
        assert there or f"no model is written to {out}: no strategy of the app returned one" in done.output
        out.unlink(missing_ok=True)


def test_a_clients_stack_is_shown_where_it_is_asked_for(make_app):
    folder = make_app(client=CLIENT.replace("query", "train").replace("print(", "raise KeyError("))
    command = [sys.executable, "-m", "edgefl", "simulate", str(folder), "--engine", "pool"]
    for flags, stack in (([], False), (["--debug"], True)):
        done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert ("Traceback" in done.stderr) == stack
        assert "error: Flower app 'adder': every client failed, in every round." in done.stderr
        assert "KeyError: 'from a client'" in done.stderr


@pytest.mark.parametrize("engine", ["loop", "pool"])
def test_ctrl_c_keeps_the_model_and_the_json(make_app, tmp_path, engine):
    folder = make_app()
    command = [sys.executable, "-m", "edgefl", "simulate", str(folder), "--set", "rounds=1000000", "--engine", engine]
    out, said = tmp_path / "model.safetensors", tmp_path / "r.json"
    with subprocess.Popen(
        [*command, "--out", str(out), "--json", str(said)], stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith("round 3:"):
                process.send_signal(signal.SIGINT)
                break
        last = process.stdout.read().splitlines()[-1]
    result = json.loads(said.read_text())
    assert process.returncode == 130
    assert last == f"interrupted after {len(result['rounds'])} rounds"
    assert result["model"]["path"] == str(out)
    # Partitions 0 and 1 add 1 and 2 with weights 1 and 2. The last round may be without either.
    whole = len(result["rounds"]) - 1
    assert SpooledTree(out)["0"][0] == pytest.approx(whole * 5 / 3, abs=2.1)
