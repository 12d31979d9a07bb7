"""Settings of training in parts: complete, fitting each other, or refused in words."""

from __future__ import annotations

from typing import Any

import pytest

from edgefl.config import JobConfig, TrainConfig, from_dict, load_config
from edgefl.errors import ConfigError
from edgefl.protocols.fields import from_json, to_json
from edgefl.settings.split import SplitConfig

GOOD: dict[str, Any] = {"cut": "layer1", "server": "cloud.example.org:9470"}


def test_a_job_in_parts_is_read_from_toml_and_goes_with_the_plan(tmp_path: Any) -> None:
    file = tmp_path / "job.toml"
    file.write_text('[train]\nmode = "split"\n[train.split]\ncut = "6"\nlast_cut = "24"\nserver = "10.0.0.1:9470"\n')
    config = load_config(JobConfig, file, ["train.split.micro_batches=4"])
    assert config.train.split == SplitConfig(cut="6", last_cut="24", server="10.0.0.1:9470", micro_batches=4)
    assert from_json(TrainConfig, to_json(config.train)) == config.train


@pytest.mark.parametrize(
    ("split", "reason"),
    [
        (GOOD | {"server": "cloud"}, "is not HOST:PORT"),
        (GOOD | {"server": "cloud:99999"}, "is not HOST:PORT"),
        (GOOD | {"wire": "int8"}, "is not one of: fp32, fp16, bf16"),
        (GOOD | {"wire": "int8", "device_part": "frozen", "last_cut": "b"}, "is not one of: fp32, fp16, bf16"),
        (GOOD | {"micro_batches": 0}, "micro_batches"),
        (GOOD | {"cloud_part": "own"}, "is not one of: per-device, shared"),
        (GOOD | {"gradients": "auxiliary", "last_cut": "b"}, "needs its gradients|the cloud needs"),
        (GOOD | {"gradients": "auxiliary", "device_part": "frozen"}, "has no loss of its own"),
        (GOOD | {"cloud_part": "shared", "last_cut": "b"}, "Use per-device"),
    ],
)
def test_what_cannot_be_trained_is_refused(split: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        from_dict(JobConfig, {"train": {"mode": "split", "split": split}})


@pytest.mark.parametrize(
    ("train", "reason"),
    [
        ({"mode": "split", "split": GOOD, "algorithm": "fedsgd"}, "needs train.algorithm=fedavg"),
        ({"mode": "split", "split": GOOD, "processes": 2}, "needs train.processes=1"),
        ({"split": GOOD}, "add train.mode='split'"),
        ({"mode": "parts"}, "is not one of: local, split"),
    ],
)
def test_other_settings_that_do_not_fit_are_named(train: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        from_dict(JobConfig, {"train": train})


def test_int8_is_for_what_is_sent_once() -> None:
    assert SplitConfig(**GOOD, wire="int8", device_part="frozen").sends_once
    assert not SplitConfig(**GOOD, device_part="frozen", last_cut="b").sends_once
    assert not SplitConfig(**GOOD, device_part="frozen").returns_gradients
    assert SplitConfig(**GOOD, gradients="auxiliary").keeps_state


def test_a_job_needs_a_cut_and_a_server() -> None:
    for split, reason in (({"server": "cloud:1"}, "needs train.split.cut"), ({"cut": "a"}, "needs train.split.server")):
        with pytest.raises(ConfigError, match=reason):
            SplitConfig(**split).require_complete()
    SplitConfig(**GOOD).require_complete()
