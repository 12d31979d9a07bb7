"""One side's tensors: what is owned, what is shared, and a step by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgefl.config import TrainConfig
from edgefl.errors import TaskError
from edgefl.offload.training.state import PartState
from tests.edgefl.offload.training.models import adamw, picture_task

TENSORS = {"w": np.ones(2, np.float32), "b": np.zeros(1, np.float32), "frozen": np.full(3, 7, np.float32)}


def state(task=None, **more):  # type: ignore[no-untyped-def]
    config = TrainConfig(lr=0.5, **more)
    return PartState(task or picture_task(), ["w", "b", "frozen"], TENSORS, trained={"w"}, buffers={"b"}, config=config)


def test_a_step_by_hand() -> None:
    one = state()
    (one.tensors["w"] * torch.tensor([1.0, 3.0])).sum().backward()
    (one.tensors["w"] * torch.tensor([1.0, 1.0])).sum().backward()  # gradients add up: 2 and 4
    one.step(torch.tensor(0.0))
    assert one.tensors["w"].tolist() == [0.0, -1.0]  # 1 - 0.5 * 2, 1 - 0.5 * 4
    assert one.tensors["w"].grad is None
    assert TENSORS["w"].tolist() == [1.0, 1.0]
    assert set(one.moving()) == {"w", "b"}


def test_frozen_tensors_are_not_copied_and_missing_ones_are_named() -> None:
    assert state().tensors["frozen"].data_ptr() == TENSORS["frozen"].ctypes.data
    with pytest.raises(TaskError, match="other is missing among the tensors of this part"):
        PartState(picture_task(), ["other"], TENSORS, trained=(), buffers=(), config=TrainConfig())


def test_gradients_of_two_sessions_are_apart() -> None:
    one = state()
    one.tensors["w"].sum().backward()
    taken = one.take_gradients()
    assert one.tensors["w"].grad is None
    (one.tensors["w"] * 5).sum().backward()
    one.drop_gradients()
    one.put_gradients(taken)
    assert one.tensors["w"].grad is not None
    assert one.tensors["w"].grad.tolist() == [1.0, 1.0]
    one.put_gradients([])
    assert one.tensors["w"].grad is None


def test_a_snapshot_has_the_optimizer_and_pulls_to_where_the_round_began() -> None:
    one = state(picture_task(optimizer=adamw), proximal_mu=0.3)
    for _ in range(3):
        one.tensors["w"].pow(2).sum().backward()
        one.step(torch.tensor(0.0))
    again = state(picture_task(optimizer=adamw), proximal_mu=0.3)
    again.restore(one.snapshot())
    for two in (one, again):
        two.tensors["w"].pow(2).sum().backward()
        two.step(torch.tensor(0.0))
    assert torch.equal(one.tensors["w"], again.tensors["w"])
    assert any(name.startswith("optimizer/") for name in one.snapshot())
