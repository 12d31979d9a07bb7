"""What the command was asked for."""

import dataclasses
import sys
from pathlib import Path

import pytest

from edgefl.app.commands.request import SimulateRequest
from edgefl.errors import ConfigError, MissingExtra

PLAIN = SimulateRequest(
    task="t", clients=None, rounds=None, engine="auto", address=None, config=None, settings=(), sweep=(), data=(),
    evaluate_every=1, out=None, plot=None, tensorboard=None, checkpoint=None, checkpoint_every=1, resume=None,
)  # fmt: skip


def asked(**changes):
    return dataclasses.replace(PLAIN, **changes)


def test_short_flags_are_settings():
    assert asked(settings=("a.b=1",), rounds=3, clients=7).over() == (
        "a.b=1", "rounds.count=3", "population.clients=7",
    )  # fmt: skip


def test_data_options():
    assert asked(data=("a=b=c", "d=")).options() == {"a": "b=c", "d": ""}
    with pytest.raises(ConfigError, match="not of the form"):
        asked(data=("a",)).options()


def test_what_a_flower_app_has_not():
    assert asked().only_for_tasks() == []
    assert asked(data=("a=b",), resume=Path("x"), evaluate_every=2).only_for_tasks() == ["--resume", "--evaluate-every"]


def test_what_a_task_has_not():
    asked().refuse_flowers()
    with pytest.raises(ConfigError, match="--federation-config is for Flower apps; configure a task with --set"):
        asked(federation_config=("num-supernodes=2",)).refuse_flowers()


def test_what_cannot_be_written_is_said_at_once(tmp_path, monkeypatch):
    for flag in ("out", "plot"):
        with pytest.raises(ConfigError, match=f"--{flag} .* there is no folder"):
            asked(**{flag: tmp_path / "no" / "file.png"})
    for name in ("file", "file.xyz"):
        with pytest.raises(ConfigError, match=rf"--plot .*{name}: the extension must be one of: .*\.png"):
            asked(plot=tmp_path / name)
    assert asked(plot=tmp_path / "file.SVG").plot is not None
    with pytest.raises(ConfigError, match="--out belongs to a single run; drop it or --sweep"):
        asked(out=tmp_path / "m", sweep=("a=1",))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingExtra, match="sim"):
        asked(plot=tmp_path / "a.png")
    with pytest.raises(MissingExtra, match=r"\[tensorboard\]"):
        asked(tensorboard=tmp_path)


def test_a_models_name_is_refused_early_and_belongs_to_a_single_run():
    with pytest.raises(ConfigError, match="cannot be a model's name"):
        asked(publish="My Model")
    with pytest.raises(ConfigError, match="--publish belongs to a single run"):
        asked(publish="m", sweep=("train.lr=1,2",))
    assert asked(publish="m").only_for_tasks() == ["--publish"]
