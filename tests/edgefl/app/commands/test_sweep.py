"""`edgefl simulate --sweep`."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from edgefl.app.commands.simulate import simulate
from edgefl.errors import ConfigError

APP = Path(__file__).parents[4] / "examples" / "flower-app"


def invoke(*arguments):
    return CliRunner().invoke(simulate, [str(one) for one in arguments], catch_exceptions=False)


def test_one_plot_one_json_and_a_comparison(tasks, tmp_path):
    done = invoke(
        tasks("task"), "--clients", 4, "--rounds", 2, "--engine", "loop", "--sweep", "train.lr=0.1,0.5",
        "--sweep", "server.optimizer=SGD,Adam", "--plot", tmp_path / "a.png", "--json", tmp_path / "a.json",
        "--tensorboard", tmp_path / "events",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    said = json.loads((tmp_path / "a.json").read_text())
    assert [one["settings"] for one in said["variants"]] == [
        {"train.lr": lr, "server.optimizer": name} for lr in (0.1, 0.5) for name in ("SGD", "Adam")
    ]
    assert {"rounds", "final", "seconds", "clients_per_second", "engine", "model"} <= said["variants"][0].keys()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "train.lr=0.5, server.optimizer=Adam: round 2/2: 4 admitted" in done.output
    assert "variant\t\trounds\taccuracy" in done.output
    events = EventAccumulator(str(tmp_path / "events" / "train.lr=0.5,_server.optimizer=Adam")).Reload()
    assert [one.step for one in events.Scalars("accuracy")] == [1, 2]


def test_a_variant_that_fails_ends_in_1_with_all_results(tasks, tmp_path):
    done = invoke(
        tasks("task"), "--clients", 4, "--rounds", 1, "--engine", "loop", "--data", "empty=1",
        "--sweep", "rounds.quorum=4,1", "--json", tmp_path / "a.json",
    )  # fmt: skip
    assert done.exit_code == 1
    bad, good = json.loads((tmp_path / "a.json").read_text())["variants"]
    assert "the quorum is 4" in bad["error"]
    assert len(good["rounds"]) == 1
    assert "1 variant of 2 failed" in done.output


def test_a_flower_apps_run_config_is_swept(tmp_path):
    done = invoke(
        APP, "--clients", 2, "--rounds", 1, "--engine", "loop", "--sweep", "local-epochs=1,2",
        "--plot", tmp_path / "a.png", "--json", tmp_path / "a.json", "--tensorboard", tmp_path / "events",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    one, two = json.loads((tmp_path / "a.json").read_text())["variants"]
    assert (one["settings"], two["settings"]) == ({"local-epochs": 1}, {"local-epochs": 2})
    assert one["final"] != two["final"]
    assert one["clients_by_rounds"] == {"1": 2}
    assert (tmp_path / "events" / "local-epochs=2").is_dir()


@pytest.mark.parametrize(("sweep", "reason"), [("no-such=1,2", "no run-config key 'no-such'"), ("a", "--sweep 'a'")])
def test_what_a_flower_app_has_not_is_refused_before_it_runs(sweep, reason):
    with pytest.raises(ConfigError, match=reason):
        invoke(APP, "--sweep", sweep)


EVALUATED = """
import numpy as np
from edgefl import EvalResult, FitResult, Task

def fit(parameters, config, options):
    return FitResult(tree={"w": np.full(1, config.lr, np.float32)}, weight=1.0)

def evaluate_locally(parameters, options):
    if options["part"] == "1":
        raise ValueError("no card")
    return EvalResult(metrics={"gain": float(parameters["w"][0])}, weight=1.0)

task = Task(name="t", initial=lambda: {"w": np.zeros(1, np.float32)}, fit=fit, evaluate_locally=evaluate_locally,
            higher_is_better={"gain": True})
"""


def test_what_devices_evaluated_is_compared_drawn_and_written_also_of_the_last_models(tmp_path):
    folder = tmp_path / "swept"
    folder.mkdir()
    (folder / "swept_task.py").write_text(EVALUATED)
    (folder / "pyproject.toml").write_text('[tool.edgefl]\ntask = "swept_task:task"\n')
    done = invoke(
        folder, "--clients", 3, "--rounds", 2, "--engine", "loop", "--sweep", "train.lr=0.5,1", "--plot",
        tmp_path / "a.png", "--json", tmp_path / "a.json", "--tensorboard", tmp_path / "events",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    [row] = [line for line in done.output.splitlines() if line.startswith("train.lr=1\t")]
    assert "\t2±0 (worst tenth 2)" in row
    assert done.output.count("not evaluated: ") == 2  # once for each variant
    assert "no card" in done.output
    events = EventAccumulator(str(tmp_path / "events" / "train.lr=1")).Reload()
    assert [(one.step, one.value) for one in events.Scalars("devices/gain")] == [(0, 0.0), (1, 1.0), (2, 2.0)]
