"""Which settings of local training adapters cannot have."""

from __future__ import annotations

import pytest

from edgefl.config import TrainConfig
from edgefl.errors import TaskError
from edgefl.training.adapters.settings import refuse_settings, training_fault


@pytest.mark.parametrize(
    ("train", "fault"),
    [
        (TrainConfig(algorithm="fedsgd"), "Use train.algorithm=fedavg"),
        (TrainConfig(keep_optimizer_state=True), "adapters begin anew in each round"),
        (TrainConfig(processes="auto"), "Use train.processes=1"),
        (TrainConfig(fragments=2), "server.fragments=2: adapters begin anew in each round"),
    ],
)
def test_a_fault_says_what_to_do(train: TrainConfig, fault: str) -> None:
    assert fault in training_fault(train)


def test_a_device_refuses_them_if_there_are_adapters() -> None:
    refuse_settings("t", (), TrainConfig(algorithm="fedsgd"))
    with pytest.raises(TaskError, match="task 't' trains LoRA adapters, and train"):
        refuse_settings("t", ("an adapter",), TrainConfig(algorithm="fedsgd"))


def test_all_others_are_fine() -> None:
    assert training_fault(TrainConfig(proximal_mu=0.1, steps=5, lora_ranks=[2, 4])) == ""
