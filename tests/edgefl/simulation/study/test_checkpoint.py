"""Going on from a checkpoint equals never having stopped."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgefl.config import from_dict
from edgefl.errors import ConfigError
from edgefl.simulation.simulate import Watching, simulate
from edgefl.simulation.study.checkpoint import (
    FILE,
    Checkpoint,
    Checkpoints,
    flat_settings,
    open_checkpoints,
    read_checkpoint,
    refuse_another,
    refuse_other_shapes,
)
from edgefl.simulation.world.settings import SimulationConfig
from edgefl.testing import make_report
from edgefl.trees import write_tree

ADAM = {"optimizer": "Adam", "lr": 0.05}
PHONES = {  # batteries that training empties, links, drop-outs and a deadline that some miss
    "speed": {"kind": "uniform", "min": 0.02, "max": 1.0},
    "availability": {"kind": "battery", "period_s": 4000.0, "drain_per_hour": 0.9, "dropout": 0.2},
}


def config(count, **sections):
    data = {"rounds": {"count": count, "clients": 4, "deadline_s": 120.0}, "population": {"clients": 12}} | sections
    return from_dict(SimulationConfig, data)


def facts(result):
    """What must not depend on where the simulation was interrupted: all but real time."""
    return [{key: value for key, value in one.as_json().items() if key != "seconds"} for one in result.rounds]


def test_resuming_needs_no_settings_and_takes_new_ones(tasks, tmp_path):
    sections = {"server": ADAM, "population": {"clients": 12, "devices": PHONES}, "train": {"lr": 0.02}}
    whole = simulate(tasks("task"), engine="loop", config=config(5, **sections))
    simulate(tasks("task"), engine="loop", config=config(2, **sections), checkpoint=tmp_path)
    assert facts(simulate(tasks("task"), rounds=5, resume=tmp_path)) == facts(whole)
    with pytest.raises(ConfigError, match=r"was made with train.lr=0.02, now it is 0.5"):
        simulate(tasks("task"), set={"train.lr": 0.5}, resume=tmp_path)


@pytest.mark.parametrize(
    ("engine", "sections"),
    [
        ("loop", {"server": ADAM}),
        ("loop", {"server": ADAM, "population": {"clients": 12, "devices": PHONES}}),
    ],
)
def test_the_result_is_that_of_an_undisturbed_run(tasks, tmp_path, engine, sections):
    whole = simulate(tasks("task"), engine=engine, config=config(9, **sections))
    simulate(tasks("task"), engine=engine, config=config(2, **sections), checkpoint=tmp_path)
    simulate(tasks("task"), config=config(5, **sections), resume=tmp_path)
    result = simulate(tasks("task"), config=config(9, **sections), resume=str(tmp_path))
    assert facts(result) == facts(whole)
    assert result.model == whole.model
    assert result.virtual_seconds == whole.virtual_seconds
    assert result.took_part.tolist() == whole.took_part.tolist()
    assert (result.engine, result.engine_reason) == (engine, "resumed after round 5 of 9")
    again = simulate(tasks("task"), resume=tmp_path)
    assert facts(again) == facts(whole)
    assert not again.interrupted


def test_stacks_go_on_with_the_same_numbers_to_rounding(tasks, tmp_path):
    sections = {"server": {"options": {"momentum": 0.9}}}  # and steps are recorded anew, which rounds them otherwise
    whole = simulate(tasks("task"), engine="stacked", config=config(9, **sections))
    simulate(tasks("task"), engine="stacked", config=config(5, **sections), checkpoint=tmp_path)
    result = simulate(tasks("task"), config=config(9, **sections), resume=tmp_path)
    assert result.took_part.tolist() == whole.took_part.tolist()
    for name, array in whole.parameters.items():
        np.testing.assert_allclose(result.parameters[name], array, rtol=0, atol=1e-12)


def test_batteries_are_a_part_of_the_state(tasks, tmp_path):
    sections = {"population": {"clients": 12, "devices": PHONES}}
    simulate(tasks("task"), engine="loop", config=config(3, **sections), checkpoint=tmp_path)
    saved = read_checkpoint(tmp_path)
    assert saved.spent.shape[0] > 0
    assert saved.virtual_s > 0


def test_ctrl_c_keeps_a_whole_round_and_never_a_cut_one(tasks, tmp_path):
    whole = simulate(tasks("task"), engine="loop", config=config(6))

    def after_three(outcome):
        if outcome.round == 3:
            signal.raise_signal(signal.SIGINT)

    stopped = simulate(
        tasks("task"), engine="loop", config=config(6), checkpoint=tmp_path, watching=Watching(on_round=after_three)
    )
    assert (stopped.interrupted, read_checkpoint(tmp_path).round) == (True, 3)
    assert facts(simulate(tasks("task"), config=config(6), resume=tmp_path)) == facts(whole)


def test_every_nth_round_and_the_last_is_kept(tasks, tmp_path):
    seen = []

    def look(_outcome):
        seen.append(read_checkpoint(tmp_path).round if (tmp_path / FILE).exists() else 0)

    simulate(
        tasks("task"), engine="loop", config=config(5), checkpoint=tmp_path, checkpoint_every=2,
        watching=Watching(on_round=look),
    )  # fmt: skip
    assert seen == [0, 2, 2, 4, 5]


def test_another_folder_may_take_up_what_follows(tasks, tmp_path):
    simulate(tasks("task"), engine="loop", config=config(1), checkpoint=tmp_path / "a")
    simulate(tasks("task"), config=config(2), resume=tmp_path / "a", checkpoint=tmp_path / "b")
    assert (read_checkpoint(tmp_path / "a").round, read_checkpoint(tmp_path / "b").round) == (1, 2)


def test_killed_in_mid_round_the_command_goes_on_as_if_nothing_had_been(tasks, tmp_path):
    flags = [
        "simulate", tasks("task"), "--clients", "200", "--engine", "loop", "--rounds", "8",
        "--set", "train.epochs=4", "--set", "server.optimizer=Adam", "--set", "server.lr=0.05",
    ]  # fmt: skip
    edgefl = [Path(sys.executable).with_name("edgefl"), *flags]
    kept = tmp_path / "kept"
    with subprocess.Popen([*edgefl, "--checkpoint", kept], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("round 3/"):
                process.kill()  # a round takes a tenth of a second: the fourth has begun
                break
    assert process.returncode == -signal.SIGKILL
    assert 3 <= read_checkpoint(kept).round < 8
    for name, more in (("whole", []), ("resumed", ["--resume", kept])):
        subprocess.run([*edgefl, *more, "--json", tmp_path / name], check=True, capture_output=True, timeout=100)
    whole, resumed = (json.loads((tmp_path / name).read_text()) for name in ("whole", "resumed"))
    assert resumed["engine_reason"].startswith("resumed after round")
    assert resumed["model"] == whole["model"]
    assert [one["metrics"] for one in resumed["rounds"]] == [one["metrics"] for one in whole["rounds"]]
    assert resumed["clients_by_rounds"] == whole["clients_by_rounds"]


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"train": {"lr": 0.2}}, r"train\.lr=0\.1, now it is 0\.2"),
        ({"server": {"options": {"momentum": 0.9}}}, r"server\.options"),
        ({"population": {"clients": 13}}, r"population\.clients=12, now it is 13"),
        ({"rounds": {"count": 9, "clients": 5, "deadline_s": 120.0}}, r"rounds\.clients=4, now it is 5"),
        (
            {"rounds": {"count": 1, "clients": 4, "deadline_s": 120.0}},
            r"rounds\.count=1, but the checkpoint already has 2",
        ),
    ],
)
def test_other_settings_are_refused_by_name(tasks, tmp_path, sections, reason):
    simulate(tasks("task"), engine="loop", config=config(2), checkpoint=tmp_path)
    with pytest.raises(ConfigError, match=reason):
        simulate(tasks("task"), config=config(9, **sections), resume=tmp_path)


def make(**changes):
    facts = {
        "task": "t", "engine": "loop", "settings": flat_settings(config(2)), "rounds": [make_report()], "seconds": 1.0,
        "virtual_s": None, "parameters": {"w": np.ones(3, np.float32)}, "optimizer": {}, "took_part": np.zeros(2, "u4"),
        "spent": np.zeros((0, 3)),
    }  # fmt: skip
    return Checkpoint(**facts | changes)


def test_what_is_written_is_read(tmp_path):
    Checkpoints(tmp_path).write(make(optimizer={"0.step": np.array(3.0)}, virtual_s=0.1 + 0.2))
    read = read_checkpoint(tmp_path)
    assert (read.round, read.virtual_s, read.optimizer["0.step"].shape) == (1, 0.1 + 0.2, ())
    assert read.parameters["w"].tolist() == [1, 1, 1]
    assert [one.name for one in tmp_path.iterdir()] == [FILE]


def test_another_task_model_or_population_is_refused():
    with pytest.raises(ConfigError, match="of task 't', not of 'u'"):
        refuse_another(make(), "u", config(2))
    with pytest.raises(ConfigError, match=r"'w' is float32\[3\] there, and float32\[4\] in the task"):
        refuse_other_shapes(make(), {"w": np.ones(4, np.float32)}, 2)
    with pytest.raises(ConfigError, match="of 2 clients, there are 3"):
        refuse_other_shapes(make(), {"w": np.ones(3, np.float32)}, 3)


def test_what_is_no_checkpoint_is_said(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        read_checkpoint(tmp_path)
    Checkpoints(tmp_path).write(make())
    whole = (tmp_path / FILE).read_bytes()
    for torn in (b"", whole[:7], whole[:-1], whole[:200], b"x" * 300):
        (tmp_path / FILE).write_bytes(torn)
        with pytest.raises(ConfigError, match="is damaged, or not a checkpoint"):
            read_checkpoint(tmp_path)
    for foreign in ({"w": np.ones(2)}, {"facts": np.frombuffer(b"[]", np.uint8)}):
        with (tmp_path / FILE).open("wb") as file:
            write_tree(foreign, file)
        with pytest.raises(ConfigError, match="is damaged, or not a checkpoint"):
            read_checkpoint(tmp_path)
    with (tmp_path / FILE).open("wb") as file:
        write_tree({"facts": np.frombuffer(b'{"format": 99}', np.uint8)}, file)
    with pytest.raises(ConfigError, match="has format 99; this edgefl knows format 1"):
        read_checkpoint(tmp_path)


def test_a_folder_is_one_simulations_alone(tmp_path):
    with open_checkpoints(None, None) as none:
        assert none is None
    with pytest.raises(ConfigError, match="has no checkpoint"), open_checkpoints(None, tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()
    with (
        open_checkpoints(tmp_path, None),
        pytest.raises(ConfigError, match="in use by another simulation"),
        open_checkpoints(tmp_path, None),
    ):
        pass
    Checkpoints(tmp_path).write(make())
    with pytest.raises(ConfigError, match="has a checkpoint; continue with --resume"), open_checkpoints(tmp_path, None):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot keep checkpoints"), open_checkpoints(tmp_path / "file", None):
        pass


def test_a_checkpoint_from_before_a_setting_came_is_gone_on_with():
    older = {key: value for key, value in flat_settings(config(2)).items() if key != "train.schedule"}
    refuse_another(make(settings=older), "t", config(2))
    with pytest.raises(ConfigError, match=r'train\.schedule="constant", now it is "step"'):
        refuse_another(make(settings=older), "t", config(2, train={"schedule": "step"}))


def test_a_cosine_spans_all_rounds_so_their_number_stays():
    cosine = config(2, train={"schedule": "cosine"})
    refuse_another(make(settings=flat_settings(cosine)), "t", cosine)
    with pytest.raises(ConfigError, match="spans all rounds"):
        refuse_another(make(settings=flat_settings(cosine)), "t", config(3, train={"schedule": "cosine"}))
