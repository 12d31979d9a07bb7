"""The gradient of one process that has a share; several are in test_together."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from edgefl.task import Task
from edgefl.training.parallel.gradients import SharedGradient, full, tensors_of


@pytest.fixture
def group(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_share_of_a_batch_by_hand(group, strategy):
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    task = Task(name="t", model=nn.Module, loss=nn.functional.mse_loss, train_data=tuple)
    gradient = SharedGradient(task, model, strategy=strategy, size=1)
    gradient.share = 0.5
    x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[2.0], [4.0]])
    gradients, loss = gradient(x, y)
    # loss = mean((w x - y)^2) = 2.5, its gradient = -5; half of both
    assert [full(one).tolist() for one in gradients] == [[[-2.5]]]
    assert loss.item() == 1.25
    assert gradient.accumulate(x, y).item() == 1.25
    gradient.sum_up()
    assert full(gradient.trained[0].grad).tolist() == [[-5.0]]  # added to the first
    assert {name: one.tolist() for name, one in tensors_of(model)} == {"weight": [[1.0]]}
