"""One buffer under a model."""

import numpy as np
import pytest
import torch
from torch import nn

from edgefl.simulation.steps.flat_buffer import FlatModel


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.two.weight = self.one.weight
        self.register_buffer("seen", torch.tensor(5, dtype=torch.int64))


def tree_of(model):
    return {name: tensor.detach().clone().numpy() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_model_is_as_it_was_and_its_changes_come_out(channels_last):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    before = tree_of(model)
    flat = FlatModel(model, channels_last=channels_last)
    for name, array in tree_of(model).items():
        np.testing.assert_array_equal(array, before[name])
    flat.start_from(before)
    with torch.no_grad():
        model[0].weight[1, 0, 2, 1] += 0.5
        model[1].num_batches_tracked += 3
    delta = flat.delta()
    wanted = np.zeros((3, 2, 3, 3), np.float32)
    wanted[1, 0, 2, 1] = 0.5
    np.testing.assert_allclose(delta["0.weight"], wanted, atol=1e-7)
    assert delta["1.num_batches_tracked"] == 3
    assert {name: (array.shape, array.dtype) for name, array in delta.items()} == {
        name: (array.shape, array.dtype) for name, array in before.items()
    }
    flat.reset()
    assert all(not array.any() for array in flat.delta().values())
    assert delta["1.num_batches_tracked"] == 3  # it was a copy


def test_what_is_lent_is_the_change_until_the_model_is_reset():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    flat = FlatModel(model, channels_last=True)
    flat.start_from(tree_of(model))
    for moved in (1.5, -2.0):
        flat.reset()
        with torch.no_grad():
            model[0].weight[1, 0, 2, 1] += moved
            model[1].num_batches_tracked += 3
        wanted = flat.delta()
        lent = flat.moved()
        assert {name: array.tolist() for name, array in lent.items()} == {n: a.tolist() for n, a in wanted.items()}
    assert np.shares_memory(lent["0.weight"], flat.moved()["0.weight"])


def test_tensors_that_are_shared_stay_one():
    model = Tied()
    flat = FlatModel(model)
    flat.start_from(tree_of(model))
    with torch.no_grad():
        model.two.weight += 1
    assert model.one.weight is model.two.weight
    delta = flat.delta()
    np.testing.assert_allclose(delta["one.weight"], 1, atol=1e-6)
    np.testing.assert_array_equal(delta["one.weight"], delta["two.weight"])
    assert delta["seen"].shape == ()
