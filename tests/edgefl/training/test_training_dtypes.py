"""Local training in each dtype: what is sent, what is refused, and what stays as it is."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from edgefl.config import TrainConfig
from edgefl.errors import TaskError
from edgefl.task import Task
from edgefl.training.local import initial_parameters, train_locally
from edgefl.trees import bfloat16

X = np.array([[1.0], [2.0]], np.float32)
Y = np.array([[2.0], [4.0]], np.float32)


def test_bfloat16_is_sent_and_trained():
    task = Task(
        name="t", model=lambda: nn.Linear(1, 1).bfloat16(), loss=mse_loss,
        train_data=lambda: (X.astype(bfloat16()), X.astype(bfloat16())),
    )  # fmt: skip
    start = initial_parameters(task)
    assert {array.dtype for array in start.values()} == {bfloat16()}
    moved = train_locally(task, start, TrainConfig(), options={}, round=1, client="a").tree
    assert {array.dtype for array in moved.values()} == {bfloat16()}
    assert float(np.abs(moved["weight"]).max()) > 0


class Odd(nn.Module):
    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("odd", tensor)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.zeros(2, dtype=torch.complex64), r"'odd' is complex64\[2\]: complex numbers cannot be sent; send"),
        (torch.zeros(2).to(torch.float8_e4m3fn), r"'odd' is torch.float8_e4m3fn and cannot be sent"),
        (torch.eye(2).to_sparse(), r"'odd' is torch.float32 and cannot be sent: .* Keep it as a dense tensor"),
    ],
    ids=["complex", "float8", "sparse"],
)
def test_what_the_wire_does_not_carry_is_refused_by_name_with_the_way_out(tensor: torch.Tensor, said: str) -> None:
    task = Task(name="t", model=lambda: Odd(tensor), loss=mse_loss, train_data=lambda: (X, Y))
    with pytest.raises(TaskError, match=said):
        initial_parameters(task)


def test_a_model_in_float64_trains_on_numpys_default_without_a_cast() -> None:
    def model() -> nn.Module:
        line = nn.Linear(1, 1, bias=False, dtype=torch.float64)
        nn.init.constant_(line.weight, 1.0)
        return line

    task = Task(name="t", model=model, loss=mse_loss, train_data=lambda: (np.array([[1.0 + 1e-9]]), np.array([[0.0]])))
    start = initial_parameters(task)
    done = train_locally(task, start, TrainConfig(lr=0.25), options={}, round=1, client="a")
    x = 1.0 + 1e-9
    assert done.tree["weight"].dtype == np.float64
    assert done.tree["weight"].item() == pytest.approx(-0.25 * 2 * x * x, abs=1e-15)
