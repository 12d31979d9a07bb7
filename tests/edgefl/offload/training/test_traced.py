"""Parts of a traced graph: what crosses, which cuts there are, and what cannot be cut."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgefl.errors import ConfigError
from edgefl.offload.training.traced import input_values, list_cuts, one_name_each, traced_parts
from tests.edgefl.offload.training.models import SmallConvNet, vit

PICTURES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))


class Late(nn.Module):
    """Reads its second input behind the cut, and returns something of before it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.register_buffer("grid", torch.arange(3.0))

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.first(one) + torch.ones(3)
        return {"hidden": hidden, "out": self.second(hidden.relu()) + other * self.grid + torch.ones(3).cumsum(0)}


def run(module: nn.Module, inputs: object, *cuts: str) -> object:
    parts = traced_parts(module, inputs, *cuts)
    values, state = input_values(inputs), module.state_dict()
    for part in parts.parts:
        values |= part.run(state, {name: values[name] for name in part.needs})
    return parts.outputs(values)


@pytest.mark.parametrize("cuts", [("first",), ("second",), ("first", "second"), ("relu", "norm")])
def test_parts_compute_what_the_module_computes(cuts: tuple[str, ...]) -> None:
    module = SmallConvNet()
    assert torch.equal(run(module, PICTURES, *cuts), module(PICTURES))  # type: ignore[arg-type]


def test_every_cut_of_a_vit_is_exact_and_constants_never_cross() -> None:
    module = vit()
    wanted, cuts = module(PICTURES), list_cuts(module, PICTURES)
    assert len(cuts) > 50
    for cut in cuts[:: len(cuts) // 6]:
        parts = traced_parts(module, PICTURES, cut)
        assert all(not name.startswith("arange") for name in parts.parts[1].needs)
        assert torch.equal(run(module, PICTURES, cut), wanted)  # type: ignore[arg-type]


def test_late_inputs_and_early_outputs_go_over_the_cut() -> None:
    module, inputs = Late(), (torch.randn(2, 3), torch.randn(2, 3))
    parts = traced_parts(module, inputs, "first")
    assert "input.1" in parts.parts[1].needs
    assert "input.0" not in parts.parts[1].needs
    found = run(module, inputs, "add")
    assert isinstance(found, dict)
    assert all(torch.equal(found[name], one) for name, one in module(*inputs).items())
    assert traced_parts(module, inputs, "add").parts[1].tensors == ["second.weight", "second.bias", "grid"]


def test_a_cut_is_named_by_a_module_or_a_node_and_another_is_refused_with_what_there_is() -> None:
    module = SmallConvNet()
    assert traced_parts(module, PICTURES, "second").parts[0].tensors[-1] == "second.bias"
    with pytest.raises(ConfigError, match=r"has no layer 'third'; cut behind a module \(first, second, norm, head\)"):
        traced_parts(module, PICTURES, "third")
    with pytest.raises(ConfigError, match="'head' is its last layer"):
        traced_parts(module, PICTURES, "head")
    with pytest.raises(ConfigError, match=r"last_cut='first' is not behind train.split.cut='second'"):
        traced_parts(module, PICTURES, "second", "first")


def test_control_flow_is_refused_in_words() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3)

        def forward(self, one: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = self.first(one)
            return hidden * 2 if hidden.sum() > 0 else hidden

    with pytest.raises(ConfigError, match=r"Branching cannot be traced as one graph.*Control flow"):
        traced_parts(Branching(), torch.randn(2, 3), "first")


def test_a_frozen_first_part_runs_as_in_evaluation() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
            self.drop, self.head = nn.Dropout(0.5), nn.Linear(4, 2)

        def forward(self, one: torch.Tensor) -> torch.Tensor:
            return self.head(self.drop(self.norm(self.first(one))))

    module, inputs = Net(), torch.randn(5, 3)
    module.norm.running_mean.fill_(0.5)
    parts = traced_parts(module, inputs, "drop", frozen=True)
    found = parts.parts[0].run(module.state_dict(), input_values(inputs))
    module.eval()
    assert torch.allclose(next(iter(found.values())), module.norm(module.first(inputs)))
    assert int(module.norm.num_batches_tracked) == 0

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, one: torch.Tensor) -> torch.Tensor:
            hidden = self.first(one)
            return self.head((hidden + torch.randn_like(hidden)).tanh())

    with pytest.raises(ConfigError, match="draws random numbers in its first part"):
        traced_parts(Noisy(), inputs, "tanh", frozen=True)


def test_tied_tensors_have_one_name() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    assert one_name_each(module) == {
        "0.weight": "0.weight",
        "0.bias": "0.bias",
        "1.weight": "0.weight",
        "1.bias": "1.bias",
    }
