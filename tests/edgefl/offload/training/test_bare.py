"""Models without weights: parameters have no memory, buffers have theirs, and the user's code is told."""

from __future__ import annotations

import pytest
import torch

from edgefl.errors import ConfigError
from edgefl.offload.training.bare import structure_only, without_weights
from tests.edgefl.offload.training.models import decoder


def test_parameters_are_on_meta_and_buffers_that_no_state_dict_has_are_real() -> None:
    with without_weights():
        assert structure_only()
        model, layer = decoder(), torch.nn.Linear(4, 4)
    assert not structure_only()
    assert layer.weight.device.type == "meta"
    assert layer.weight.requires_grad
    assert model.model.rotary_emb.inv_freq.abs().sum() > 0
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.nn.Linear(4, 4).weight.device.type == "cpu"


def test_a_parameter_that_is_frozen_stays_so() -> None:
    with without_weights():
        layer = torch.nn.Linear(2, 2)
        layer.weight = torch.nn.Parameter(torch.ones(2, 2), requires_grad=False)
    assert layer.weight.device.type == "meta"
    assert not layer.weight.requires_grad


def test_a_large_tensor_without_values_never_has_memory() -> None:
    with without_weights():
        one, other = torch.empty(1 << 20, 1 << 20), torch.empty((2, 3))  # 4 TB
        layer = torch.nn.Linear(1 << 20, 1 << 20)
        counted = torch.nn.BatchNorm1d(1 << 19)
    assert one.is_meta
    assert not other.is_meta
    assert layer.weight.is_meta
    assert counted.running_var.sum() == 1 << 19
    assert not torch.empty(1 << 20).is_meta


class Masked(torch.nn.Module):
    """A mask that is filled after it is made."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("mask", torch.empty(1024, 1024).fill_(-1.0), persistent=persistent)


def test_a_large_buffer_whose_values_would_be_lost_is_refused() -> None:
    with without_weights():
        assert Masked(persistent=True).mask.is_meta  # its values come with the job
        with pytest.raises(
            ConfigError, match=r"buffer 'mask' of Masked \[1024, 1024\] is made by torch.empty.*torch.full"
        ):
            Masked(persistent=False)
    assert Masked(persistent=False).mask[0, 0] == -1
