"""Torch modules in two stages: equal at every cut, outputs and gradients; stages merge back exactly."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from edgefl.errors import ConfigError
from edgefl.offload.torch_stages import merge_states, split_torch, torch_cuts


class Skips(nn.Module):
    """A residual with a late input, a tied weight, batch norm and two outputs."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.last.weight = self.first.weight

    def forward(self, x, scale):
        h = self.norm(self.first(x).relu())
        y = self.last(h) + x
        return y * scale, h


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Skips()


INPUTS = (torch.linspace(-1, 1, 20).reshape(5, 4), torch.tensor(2.0))


@pytest.mark.parametrize(
    ("training", "step"),
    [(True, 2), pytest.param(False, 1, marks=pytest.mark.soak), pytest.param(True, 1, marks=pytest.mark.soak)],
)
def test_outputs_gradients_and_state_at_each_cut(model, training, step):
    names = torch_cuts(model, INPUTS, training=training)
    assert len(names) >= 5
    for name in names[::step]:
        whole = copy.deepcopy(model).train(training)
        split = split_torch(model, INPUTS, name, training=training)
        merged = merge_states(*split.states())
        assert merged.keys() == model.state_dict().keys()
        assert all(torch.equal(one, model.state_dict()[key]) for key, one in merged.items())
        for wanted, seen in zip(whole(*INPUTS), split(*INPUTS), strict=True):
            assert torch.allclose(wanted, seen, atol=1e-6), name
        sum(one.sum() for one in whole(*INPUTS)).backward()
        sum(one.sum() for one in split(*INPUTS)).backward()
        summed = sum(
            one.grad for stage in (split.head, split.tail) for key, one in stage.named_parameters()
            if one.grad is not None and key in {"first.weight", "last.weight"}
        )  # fmt: skip
        assert torch.allclose(summed, whole.first.weight.grad, atol=1e-5), name  # both copies of the tied weight


def test_a_late_input_crosses(model):
    names = torch_cuts(model, INPUTS)
    crossing, _ = split_torch(model, INPUTS, names[1]).run_head(*INPUTS)
    assert any(one is INPUTS[0] for one in crossing)
    assert any(one is INPUTS[1] for one in crossing)


def test_one_output_stays_one_tensor():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    split = split_torch(model, INPUTS[:1], torch_cuts(model, INPUTS[:1])[1])
    assert torch.equal(split(INPUTS[0]), model(INPUTS[0]))


def test_the_module_stays_as_it_was(model):
    before = {name: one.clone() for name, one in model.state_dict().items()}
    split = split_torch(model, INPUTS, torch_cuts(model, INPUTS)[0], training=True)
    split(*INPUTS)
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert "forward" not in vars(model)


def test_unknown_cuts_and_untraceable_modules_are_refused(model):
    with pytest.raises(ConfigError, match="Skips has no cut 'split:none'; `torch_cuts` lists its"):
        split_torch(model, INPUTS, "split:none")

    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ConfigError, match="Branches cannot be traced as one graph"):
        split_torch(Branches(), INPUTS[:1], "x")


def test_copies_that_were_trained_apart_are_refused():
    with pytest.raises(ConfigError, match="both stages have 'w', with other values"):
        merge_states({"w": torch.zeros(2)}, {"w": torch.ones(2)})
    assert merge_states({"w": torch.ones(2)}, {"w": torch.ones(2), "b": torch.zeros(1)}).keys() == {"w", "b"}
