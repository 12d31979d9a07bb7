"""Channels last: the same values, in another order of memory."""

from __future__ import annotations

import pytest
import torch

from edgefl.training.steps.layout import has_channels_last, laid_out, lay_out


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the layout stays")
def test_convolutions_on_a_cpu_and_nothing_else_train_with_channels_last():
    assert has_channels_last(torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3)))
    assert not has_channels_last(torch.nn.Linear(2, 3))


def test_a_group_norm_whose_input_needs_no_gradient_trains_as_it_is():
    norm, conv = torch.nn.GroupNorm(1, 2), torch.nn.Conv2d(2, 2, 1)
    assert not has_channels_last(torch.nn.Sequential(norm, conv))
    frozen = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 1).requires_grad_(False), torch.nn.GroupNorm(1, 2))
    assert not has_channels_last(frozen)
    assert has_channels_last(torch.nn.Sequential(conv, norm)) is not torch.cuda.is_available()
    torch.autograd.grad(frozen(torch.ones(2, 2, 3, 3)).square().sum(), list(frozen[1].parameters()))  # it survives


def test_kernels_and_images_keep_their_values():
    model = torch.nn.Conv2d(2, 3, 3)
    before = model.weight.detach().clone()
    lay_out(model)
    assert torch.equal(model.weight, before)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    images = torch.arange(48.0).reshape(2, 2, 3, 4)
    found = laid_out({"images": images, "sizes": torch.ones(2)})
    assert torch.equal(found["images"], images)
    assert found["images"].is_contiguous(memory_format=torch.channels_last)
    assert found["sizes"].shape == (2,)


def test_one_channel_stays_in_its_memory():
    images = torch.arange(24.0).reshape(2, 1, 3, 4)
    found = laid_out(images)
    assert found.data_ptr() == images.data_ptr()
    assert torch.equal(found, images)
    assert found.is_contiguous(memory_format=torch.channels_last)
