"""`edgefl simulate`."""

import json

import pytest
from click.testing import CliRunner

from edgefl.app.commands.simulate import ENGINES, simulate
from edgefl.errors import ConfigError, SignatureChanged, TaskError
from edgefl.simulation import simulate as module
from edgefl.simulation.engines import auto
from edgefl.simulation.isolation.process import OwnProcess
from edgefl.simulation.study.report import CutShort
from edgefl.trees import SpooledTree

IID = ("--set", "population.partitioner=iid")


def invoke(*arguments):
    return CliRunner().invoke(simulate, [str(one) for one in arguments], catch_exceptions=False)


def test_everything_at_once(tasks, tmp_path):
    config = tmp_path / "config.toml"
    config.write_text("[train]\nbatch_size = 4\n")
    done = invoke(
        tasks("task"), "--clients", 6, "--rounds", 2, "--engine", "stacked", "--config", config,
        "--set", "train.lr=0.5",
        "--data", "empty=2", "--plot", tmp_path / "a.png", "--json", tmp_path / "a.json", "--out", tmp_path / "model",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    said = json.loads((tmp_path / "a.json").read_text())
    assert (said["engine"], len(said["rounds"]), said["model"]["path"]) == ("stacked", 2, str(tmp_path / "model"))
    assert said["rounds"][0]["failed"] == 1
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert done.output.splitlines()[0] == "engine stacked: it was asked for"
    assert "round 2/2: 5 admitted, 1 failed" in done.output
    assert "2 rounds in " in done.output


def test_json_on_stdout_is_alone_there(tasks, capsys):
    flags = ["--clients", "2", "--rounds", "1", "--engine", "loop", "--json", "-"]
    simulate.main([str(tasks("task")), *flags], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["engine"] == "loop"


def test_an_interrupted_one_writes_its_result_and_exits_130(tasks, tmp_path, monkeypatch):
    original = module._Run.rounds_until_stopped

    def stopped(run):
        run._setup.stop.set()
        original(run)

    def in_this_process(_process, order, watching, _out):
        return module.simulate(order.task, engine=order.engine, config=order.config, watching=watching)

    monkeypatch.setattr(module._Run, "rounds_until_stopped", stopped)
    monkeypatch.setattr(OwnProcess, "simulate", in_this_process)
    done = invoke(tasks("task"), "--clients", 2, "--engine", "loop", "--json", tmp_path / "a.json")
    assert done.exit_code == 130
    assert json.loads((tmp_path / "a.json").read_text())["interrupted"] is True


def test_rounds_before_one_without_a_quorum_are_kept(tasks, tmp_path):
    (tmp_path / "night.toml").write_text("""
        rounds = {count = 9, deadline_s = 5000.0, wait_s = 60.0}
        [population.devices]
        delay_s = {kind = "uniform", min = 4000.0, max = 4000.0}
        availability = {kind = "diurnal", scatter = 0.0, share = 0.25, centre_s = 0.0}
    """)
    files = {flag: tmp_path / name for flag, name in (("--json", "a.json"), ("--plot", "a.png"), ("--out", "a.st"))}
    options = [part for pair in files.items() for part in pair]
    with pytest.raises(CutShort, match="no answer within 5000 s"):
        invoke(tasks("task"), "--clients", 4, "--engine", "loop", "--config", tmp_path / "night.toml", *options)
    said = json.loads((tmp_path / "a.json").read_text())
    assert (len(said["rounds"]), said["interrupted"]) == (2, True)  # until 4,000 and 8,000 s of the 10,800
    assert all(file.stat().st_size > 0 for file in files.values())


def test_what_is_wrong_is_said_before_the_work(tasks, tmp_path):
    with pytest.raises(ConfigError, match="not of the form key=value"):
        invoke(tasks("task"), "--data", "empty")
    with pytest.raises(ConfigError, match=r"--plot .* there is no folder"):
        invoke(tasks("task"), "--plot", tmp_path / "no" / "a.png")


def test_the_flag_names_every_engine():
    assert set(ENGINES) == {auto.AUTO, *auto.ENGINES}


def test_the_model_is_published_and_the_next_command_is_told(http_plane, wide_task, tmp_path):
    where = ["--credentials", http_plane.credentials]
    options = ["--clients", 2, "--rounds", 1, "--engine", "loop", *IID, "--publish", "m", *where]
    done = invoke(wide_task, *options, "--json", tmp_path / "a.json")
    assert done.output.splitlines()[-1] == "deliver it to the devices: edgefl rollout start m --version 1"
    said = json.loads((tmp_path / "a.json").read_text())
    assert said["release"]["version"] == http_plane.registry.release("m").version == 1
    key = "before/accuracy" if said["release"]["compression"] else "accuracy"
    assert said["release"]["metrics"][key] == pytest.approx(said["final"]["accuracy"], abs=0.05)


def test_a_model_that_is_not_published_is_kept(http_plane, wide_task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--clients", 2, "--rounds", 1, "--engine", "loop", *IID, "--publish", "m", "--json", "a.json"]

    def refused(*_arguments, **_more):
        raise SignatureChanged("other inputs")

    monkeypatch.setattr("edgefl.operator.publish.publish", refused)
    done = CliRunner().invoke(simulate, [str(wide_task), *map(str, options), "--credentials", http_plane.credentials])
    assert isinstance(done.exception, SignatureChanged)
    again = f"edgefl models publish m --task {wide_task} --parameters m.safetensors"
    assert done.output.splitlines()[-1] == f"not published; the model is kept: {again}"
    assert SpooledTree(tmp_path / "m.safetensors")
    assert len(json.loads((tmp_path / "a.json").read_text())["rounds"]) == 1


def test_a_model_that_cannot_be_published_is_refused_before_the_first_round(http_plane, tasks, tmp_path):
    where = ["--credentials", str(http_plane.credentials)]
    with pytest.raises(ConfigError, match="cannot read the operator's credentials"):
        invoke(tasks("task"), "--publish", "m", "--credentials", tmp_path / "none.json")
    with pytest.raises(TaskError, match="has no model and no export"):
        invoke(tasks("own_fit"), "--publish", "m", *where)
    with pytest.raises(ConfigError, match="say where to --publish NAME"):
        invoke(tasks("task"), *where)
