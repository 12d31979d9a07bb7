"""`edgefl simulate` of a folder with [tool.flwr.app]."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgefl.errors import ConfigError
from edgefl.simulation.cli import simulate

APP = Path(__file__).parents[3] / "examples" / "flower_app"


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
        (("--data", "a=b"), "--data: a Flower app has no such thing"),
        (("--set", "no-such-key=1"), "no-such-key"),
    ],
)
def test_what_an_app_cannot_take_is_refused(flags, reason):
    with pytest.raises(ConfigError, match=reason):
        invoke(*flags)
