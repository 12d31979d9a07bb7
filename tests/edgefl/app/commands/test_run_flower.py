"""`edgefl run` of a Flower app, by the command itself; whole runs are in tests/e2e."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from edgefl.app.commands.run import run

PYPROJECT = """
[tool.flwr.app.components]
serverapp = "small:server"
clientapp = "small:client"
[tool.flwr.app.config]
num-server-rounds = 2
"""
APP = """
from flwr.app import MetricRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client, server = ClientApp(), ServerApp()

@server.main()
def main(grid, context):
    for number in range(context.run_config["num-server-rounds"]):
        asked = [Message(RecordDict(), node, "evaluate", group_id=str(number + 1)) for node in grid.get_node_ids()]
        list(grid.send_and_receive(asked))
"""


@pytest.fixture
def app(tmp_path):
    folder = tmp_path / "small_app"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "small.py").write_text(APP)
    return folder


@pytest.fixture
def command(http_plane, app):
    def call(*options):
        return CliRunner().invoke(run, [str(app), "--credentials", str(http_plane.credentials), *map(str, options)])

    return call


def respond(_device, plan, content):
    from flwr.app import Message, MetricRecord, RecordDict

    from edgefl.flower.fleet import wire

    message, _ = wire.open_order(content, plan.envelope)
    return wire.pack_reply(Message(RecordDict({"m": MetricRecord({"score": 0.5})}), reply_to=message))


def test_rounds_are_shown_and_the_result_written(command, play_devices, tmp_path):
    play_devices(respond, "a", "b")
    done = command("--rounds", 3, "--json", tmp_path / "r.json")
    assert done.exit_code == 0, done.output
    started, *rounds, ended = [line for line in done.output.splitlines() if line != "waiting for devices"]
    assert started.startswith("relay-")
    assert started.endswith(" started: small_app, 2 devices online")
    assert [line.partition(" in ")[0] for line in rounds] == [f"round {n}/3: 2 admitted" for n in (1, 2, 3)]
    assert ended.endswith("score=0.5")
    result = json.loads((tmp_path / "r.json").read_text())
    assert [one["round"] for one in result["rounds"]] == [1, 2, 3]
    assert result["final"] == {"score": 0.5}


def test_flowers_words_are_taken_and_the_absence_of_a_model_told(command, play_devices, tmp_path):
    play_devices(respond, "a")
    done = command("--run-config", "num-server-rounds=4", "--out", tmp_path / "m.safetensors")
    assert done.exit_code == 0, done.output
    assert "round 4/4: 1 admitted" in done.output
    assert "no model is written to" in done.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--set", "colour=red"), "has no run-config key 'colour'; known: num-server-rounds"),
        (("--config", "x.toml"), "--config: not for a Flower app"),
        (("--set", "colour"), "is not of the form key=value"),
        (("--run-config", "colour = red"), "is not of the form key=value; expected --run-config"),
        (("--federation-config", "num-supernodes=3"), "on a fleet the devices that are online are the nodes"),
    ],
)
def test_what_it_cannot_take_is_refused(command, http_plane, options, said):
    done = command(*options)
    assert done.exit_code != 0
    assert said in str(done.exception)
    assert http_plane.relays.rows() == []
