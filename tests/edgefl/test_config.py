"""Configuration: TOML and settings into dataclasses; every refusal names the key."""

from __future__ import annotations

import re
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from edgefl.config import JobConfig, TrainConfig, config_of, from_dict, load_config
from edgefl.errors import ConfigError
from edgefl.rounds import select_clients


def test_defaults_need_no_file() -> None:
    assert load_config(JobConfig) == JobConfig()


def test_settings_stand_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text('[rounds]\ncount = 3\nquorum = 2\n[server]\noptimizer = "Adam"\noptions = {eps = 1e-3}\n')
    config = load_config(JobConfig, file, ["rounds.count=7", "train.lr=1", "server.options.amsgrad=true"])
    assert (config.rounds.count, config.rounds.quorum) == (7, 2)
    assert (config.train.lr, type(config.train.lr)) == (1.0, float)
    assert config.server.options == {"eps": 1e-3, "amsgrad": True}


def test_a_bare_word_is_a_string() -> None:
    assert load_config(JobConfig, settings=["server.optimizer=Adam"]).server.optimizer == "Adam"


def test_a_number_is_a_string_where_one_is_expected() -> None:
    settings = ["train.mode=split", "train.split.server=cloud:9470", "train.split.cut=6"]
    assert load_config(JobConfig, settings=settings).train.split.cut == "6"
    with pytest.raises(ConfigError, match="'true' is not one of"):  # text, so the value's own check refuses it
        load_config(JobConfig, settings=["train.algorithm=true"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("rounds.cuont=3", "unknown configuration key 'rounds.cuont'; known here: clients, count"),
        ("round.count=3", "unknown configuration key 'round'; known here: aggregation, rounds, server, tiers, train"),
        ("rounds=3", "rounds=3 must be a section"),
        ("rounds.count.x=3", "rounds.count={'x': 3} must be of type int"),
        ("rounds.count=3.5", "rounds.count=3.5 must be of type int"),
        ("rounds.count=many", "rounds.count='many' must be of type int"),
        ("rounds.count=0", "rounds.count=0 must be 1 or more"),
        ("rounds.clients=-1", "rounds.clients=-1"),
        ("rounds.quorum=0", "rounds.quorum=0"),
        ("rounds.over_selection=11", "rounds.over_selection=11"),
        ("rounds.over_selection=nan", "rounds.over_selection=nan"),
        ("rounds.deadline_s=0", "rounds.deadline_s=0"),
        ("rounds.deadline_s=inf", "rounds.deadline_s=inf"),
        ("rounds.offline_grace_s=-1", "rounds.offline_grace_s=-1"),
        ("rounds.wait_s=inf", "rounds.wait_s=inf"),
        ("train.algorithm=sgd", "train.algorithm='sgd' is not one of: fedavg, fedsgd"),
        ("train.epochs=0", "train.epochs=0"),
        ("train.steps=-1", "train.steps=-1 must be 0 or more"),
        ("train.batch_size=0", "train.batch_size=0"),
        ("train.processes=0", "train.processes=0 must be 1 or more, and at most 1024"),
        ("train.processes=all", "train.processes='all' must be a whole number, or 'auto'"),
        ("train.processes=true", "train.processes=True must be a whole number, or 'auto'"),
        ("train.strategy=zero", "train.strategy='zero' is not one of: ddp, fsdp"),
        ("train.backend=a\x1bb", "train.backend='a"),
        ("train.lr=nan", "train.lr=nan"),
        ("train.wire=fp32", "train.wire='fp32' is not one of: exact, bf16, int8"),
        ("train.proximal_mu=-0.1", "train.proximal_mu=-0.1"),
        ("rounds.count=2147483648", "rounds.count=2147483648 must be 1 or more, and at most 2147483647"),
        ("rounds.count=1e12", "rounds.count=1000000000000.0 must be of type int"),
        ("rounds.count=true", "rounds.count=True must be of type int"),
        ("rounds.deadline_s=1e12", "rounds.deadline_s=1000000000000.0 must be above 0, and at most 31622400"),
        ("rounds.deadline_s=1" + "0" * 400, "rounds.deadline_s=inf"),
        ("rounds.count=1" + "0" * 5000, "rounds.count='1000"),
        ("rounds.quorum=0x" + "f" * 9000, "rounds.quorum=an integer of 36000 bits must be 1 or more"),
        ("rounds.wait_s=1e10", "rounds.wait_s="),
        ("train.seed=-1", "train.seed=-1 must be 0 or more, and at most 9223372036854775807"),
        ("train.seed=9223372036854775808", "train.seed="),
        ("train.lr=1e39", "train.lr=1e+39"),
        ("train.lr=true", "train.lr=True must be of type float"),
        ("train.epochs=4294967296", "train.epochs="),
        ("rounds.c\ud800=1", r"unknown configuration key 'rounds.c\ud800'"),
        ("rounds.count=" + "[" * 5000, "rounds.count='[["),
        ("rounds.count", "--set 'rounds.count' is not of the form section.key=value"),
        ("=3", "is not of the form"),
    ],
)
def test_what_cannot_be_is_refused_by_name(setting: str, message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_config(JobConfig, settings=[setting])
    str(refusal.value).encode()  # or no terminal and no log could show it
    assert message in str(refusal.value)


def test_a_setting_cannot_go_below_a_value() -> None:
    with pytest.raises(ConfigError, match="'count' is a value, not a section"):
        load_config(JobConfig, settings=["rounds.count=1", "rounds.count.x=2"])


def test_a_quorum_above_the_clients_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rounds\.quorum=3 is above rounds\.clients=2"):
        from_dict(JobConfig, {"rounds": {"clients": 2, "quorum": 3}})


@pytest.mark.parametrize(("content", "message"), [(b"[rounds", "is not TOML"), (b"\xff", "is not TOML")])
def test_a_file_that_is_not_toml_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "job.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as refusal:
        load_config(JobConfig, file)
    assert str(file) in str(refusal.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.toml: No such file"):
        load_config(JobConfig, tmp_path / "gone.toml")


def test_the_bounds_are_what_the_next_layers_hold() -> None:
    utmost = load_config(
        JobConfig,
        settings=[
            "rounds.count=2147483647", "rounds.deadline_s=31622400", "rounds.wait_s=31622400",
            "rounds.offline_grace_s=31622400", "train.seed=9223372036854775807", "train.lr=3.4e38",
            "server.lr=3.4e38",
        ],
    )  # fmt: skip
    arrived = threading.Event()
    arrived.set()
    for seconds in (utmost.rounds.deadline_s, utmost.rounds.wait_s, utmost.rounds.offline_grace_s):
        assert arrived.wait(seconds)
        assert seconds < min(threading.TIMEOUT_MAX, 2**31)
    assert select_clients(["a", "b", "c"], replace_clients(utmost), utmost.rounds.count)
    assert np.isfinite(np.float32(utmost.train.lr))
    torch.Generator().manual_seed(utmost.train.seed)


def replace_clients(config: JobConfig) -> JobConfig:
    return replace(config, rounds=replace(config.rounds, clients=2))


def test_a_file_that_python_cannot_read_is_no_traceback(tmp_path: Path) -> None:
    for text in ("a = " + "1" * 5000, "a = " + "[" * 5000, "\x00"):
        (tmp_path / "job.toml").write_text(text)
        with pytest.raises(ConfigError, match="is not TOML"):
            load_config(JobConfig, tmp_path / "job.toml")


def test_a_configuration_the_same_way_at_every_door(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("[train]\nlr = 0.25\n")
    for given in (file, str(file), {"train": {"lr": 0.25}}, JobConfig(train=TrainConfig(lr=0.25))):
        assert config_of(JobConfig, given).train.lr == 0.25
        chosen = config_of(JobConfig, given, {"train.epochs": 3, "rounds.count": 7})
        assert (chosen.train.lr, chosen.train.epochs, chosen.rounds.count) == (0.25, 3, 7)
    assert config_of(JobConfig, None) == JobConfig()


@pytest.mark.parametrize(
    ("given", "settings", "words"),
    [
        (3, {}, "config is a int; expected a JobConfig, the path of a TOML file, or a mapping"),
        ("nowhere.toml", {}, "cannot read the configuration nowhere.toml"),
        ({"train": {"rate": 1}}, {}, "unknown configuration key 'train.rate'"),
        (None, {"train.rate": 1}, "unknown configuration key 'train.rate'"),
        (None, {"nothing.lr": 1}, "the configuration has no section 'nothing'"),
        (None, {"train.lr": "high"}, "train.lr='high' must be of type float"),
    ],
)
def test_a_configuration_that_cannot_be_used_says_why(given, settings, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        config_of(JobConfig, given, settings)


@pytest.mark.parametrize("settings", [["train.steps=5", "train.epochs=1"], ["train.steps=5", "train.epochs=2"]])
def test_a_round_has_one_length(settings: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"train\.steps=5 and train\.epochs=[12]: give one of them"):
        load_config(JobConfig, settings=settings)
    with pytest.raises(ConfigError, match=r"train\.steps=5 and train\.epochs=1"):
        config_of(JobConfig, {"train": {"steps": 5, "epochs": 1}})
    with pytest.raises(ConfigError, match=r"train\.steps=5 and train\.epochs=2"):
        config_of(JobConfig, {"train": {"steps": 5}}, {"train.epochs": 2})


def test_steps_take_the_place_of_the_default_epoch() -> None:
    train = load_config(JobConfig, settings=["train.steps=5", "train.batch_size=4"]).train
    assert (train.epochs, train.num_steps(9), train.num_trained(9)) == (0, 5, 9 + 2 * 4)
    assert config_of(JobConfig, JobConfig(train=train), {"train.lr": 0.5}).train.steps == 5
    assert load_config(JobConfig, settings=["train.steps=5", "train.epochs=0"]).train == replace(train, batch_size=32)
    epochs = TrainConfig(epochs=2, batch_size=4)
    assert (epochs.num_steps(9), epochs.num_trained(9)) == (6, 18)


def test_fedsgd_takes_no_local_steps() -> None:
    with pytest.raises(ConfigError, match=r"train\.steps=5: fedsgd takes no local steps"):
        load_config(JobConfig, settings=["train.steps=5", "train.algorithm=fedsgd"])
