"""What is frozen stays as it is, and is the same for everyone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgefl import Task, trees
from edgefl.config import TrainConfig
from edgefl.errors import TaskError
from edgefl.training.local import train_locally
from edgefl.training.parts import parts_of
from edgefl.trees import SpooledTree, write_tree
from edgefl.trees.frozen import refuse_moved, whole


class Net(nn.Module):
    def __init__(self, *, thaw=False, moving=False):
        super().__init__()
        self.body, self.head, self.moving = nn.Linear(3, 3), nn.Linear(3, 2), moving
        self.body.requires_grad_(thaw)

    def forward(self, inputs):
        if self.moving:
            with torch.no_grad():
                self.body.weight.mul_(0.9)
        return self.head(self.body(inputs))


def task(**how):
    data = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2
    return Task(name="t", model=lambda: Net(**how), loss=nn.functional.cross_entropy, train_data=lambda: data)


def trained(one, *, algorithm="fedavg"):
    parts = parts_of(task())
    return train_locally(
        one, parts.moving, TrainConfig(algorithm=algorithm), options={}, round=1, client="a", frozen=parts.frozen
    ).tree


def test_the_parts_together_are_the_whole_without_a_copy():
    moving, frozen = {"a": np.ones(1)}, {"b": np.zeros(1)}
    assert whole(moving, frozen) == {"b": frozen["b"], "a": moving["a"]}
    assert whole(moving, None) is whole(moving, {}) is moving


@pytest.mark.parametrize("algorithm", ["fedavg", "fedsgd"])
def test_an_update_has_what_is_trained_alone_and_is_that_of_the_whole(algorithm):
    seen = trained(task(), algorithm=algorithm)
    parts = parts_of(task())
    tensors = whole(parts.moving, parts.frozen)
    config = TrainConfig(algorithm=algorithm)
    wanted = train_locally(task(), tensors, config, options={}, round=1, client="a").tree
    assert seen.keys() == {"head.weight", "head.bias"}
    assert all(np.array_equal(seen[name], wanted[name]) for name in seen)
    assert not wanted["body.weight"].any()


def test_a_device_that_trains_other_parameters_is_refused_by_name():
    with pytest.raises(TaskError, match=r"'body\.weight' is trained here and frozen in the job"):
        trained(task(thaw=True))
    parts = parts_of(task(thaw=True))
    with pytest.raises(TaskError, match=r"'body\.weight' is frozen here and trained in the job"):
        train_locally(task(), parts.moving, TrainConfig(), options={}, round=1, client="a", frozen=parts.frozen)


def test_a_frozen_tensor_that_training_moves_is_refused_by_name():
    with pytest.raises(TaskError, match=r"changed 'body\.weight', which requires no gradient"):
        trained(task(moving=True))


def test_nan_is_what_it_was_and_order_in_memory_does_not_count():
    odd = np.array([[np.nan, 1.0], [2.0, 3.0]], np.float32)
    refuse_moved("t", {"w": np.asfortranarray(odd), "s": np.array(1)}, {"w": odd, "s": np.array(1)})
    with pytest.raises(TaskError, match="'w'"):
        refuse_moved("t", {"w": np.asfortranarray(odd.T)}, {"w": odd})


def test_large_parts_stay_mapped_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "LARGE_BYTES", 0)
    moving, frozen = {"w": np.ones(3, np.float32), "n": np.array(4)}, {"f": np.arange(5)}
    with (tmp_path / "moving").open("wb") as file:
        write_tree(moving, file)
    spooled = SpooledTree(tmp_path / "moving")
    both = whole(spooled, frozen)
    assert both["w"] is spooled["w"]
    assert both["f"] is frozen["f"]
    assert list(both) == ["f", "w", "n"]
    assert whole(moving, None) is moving
