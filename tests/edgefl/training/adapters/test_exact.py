"""Jobs that would not average adapters exactly are refused before they start, with a way out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from edgefl import aggregation
from edgefl.aggregation import WeightedMean
from edgefl.config import JobConfig, config_of
from edgefl.errors import ConfigError, TaskError
from edgefl.training.adapters.exact import refuse_inexact
from tests.e2e.tasks.lora import lora_task


class Median(WeightedMean):
    merges = False


def config(**settings: Any) -> JobConfig:
    return config_of(JobConfig, None, {key.replace("__", "."): value for key, value in settings.items()})


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"train__algorithm": "fedsgd"}, "train.algorithm=fedsgd sends one gradient.*Use train.algorithm=fedavg"),
        ({"train__keep_optimizer_state": True}, "adapters begin anew in each round.*Leave it out"),
        ({"train__processes": 2}, "Use train.processes=1"),
        ({"server__fragments": 2}, "server.fragments=2: adapters begin anew in each round.*Leave it out"),
        ({"aggregation__rule": "median"}, "is not the mean of the adapters' products. Use aggregation.rule=mean"),
    ],
)
def test_settings_that_are_not_exact(settings: dict[str, Any], fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregation, "RULES", {"mean": WeightedMean, "median": Median})
    refuse_inexact(lora_task.task, config())
    with pytest.raises(ConfigError, match=r"trains LoRA adapters \(base_model.model.up ..\), and .*" + fault):
        refuse_inexact(lora_task.task, config(**settings))
    plain = dataclasses.replace(lora_task.task, model=lora_task.Base)
    refuse_inexact(plain, config(**settings))


@pytest.mark.parametrize("init", [False, "olora"])
def test_adapters_that_do_not_begin_at_zero(init: bool | str) -> None:
    task = dataclasses.replace(
        lora_task.task, model=lambda: lora_task.with_adapters(lora_task.Base(), init_lora_weights=init)
    )
    with pytest.raises(TaskError, match="does not begin at zero: its B is not 0"):
        refuse_inexact(task, config())


class OwnLora(nn.Module):
    def __init__(self, *, both: bool = True) -> None:
        super().__init__()
        self.lora_A, self.lora_B = nn.Linear(8, 2, bias=False), nn.Linear(2, 3, bias=False)
        self.lora_A.requires_grad_(both)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.lora_B(self.lora_A(inputs))
        return outputs


class Net(nn.Module):
    def __init__(self, *, both: bool = True) -> None:
        super().__init__()
        self.layer = OwnLora(both=both)


def test_factors_that_peft_did_not_make() -> None:
    refuse_inexact(dataclasses.replace(lora_task.task, model=lambda: Net(both=False)), config())
    with pytest.raises(TaskError, match="layer 'layer' trains lora_A and lora_B, which peft did not make"):
        refuse_inexact(dataclasses.replace(lora_task.task, model=Net), config())
