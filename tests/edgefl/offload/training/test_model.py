"""A task's model by a job's settings: who has which tensors, and what is refused before it is submitted."""

from __future__ import annotations

import pytest

from edgefl.errors import ConfigError, ProtocolError, TaskError
from edgefl.offload.training.layout import layout_of
from edgefl.offload.training.model import MAX_LAYOUTS, PartedModel, tried_parts
from edgefl.training.local import initial_parameters
from tests.cloud.split.bench import settings
from tests.edgefl.offload.training.models import NormedNet, decoder, picture_task, pictures, token_task


def test_tensors_by_who_has_them() -> None:
    task = picture_task(NormedNet)
    tensors = initial_parameters(task, 0)
    model, parts = tried_parts(task, settings({"cut": "norm"}), tensors)
    trees = model.divided(parts, tensors)
    assert set(trees.in_cloud) == {"head.weight", "head.bias"} == set(model.moving_in_cloud(parts))
    assert trees.on_device == {}
    assert set(trees.buffers) == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert {*trees.moving, *trees.in_cloud} == set(tensors)


def test_a_frozen_device_part_sends_no_tensor() -> None:
    task = picture_task(NormedNet)
    tensors = initial_parameters(task, 0)
    model, parts = tried_parts(task, settings({"cut": "norm", "device_part": "frozen"}), tensors)
    trees = model.divided(parts, tensors)
    assert trees.moving == {}
    assert "first.weight" in trees.on_device
    assert not model.device_state(parts, tensors).trained


def test_a_tied_head_goes_with_its_embedding() -> None:
    task = token_task()
    tensors = initial_parameters(task, 0)
    model, parts = tried_parts(task, settings({"cut": "1", "last_cut": "2"}), tensors)
    trees = model.divided(parts, tensors)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(trees.moving)
    assert all(".layers.1." in name for name in trees.in_cloud)
    with pytest.raises(ConfigError, match="tied to the head"):
        tried_parts(task, settings({"cut": "1"}), tensors)


def test_what_cannot_be_trained_in_parts_is_refused() -> None:
    def bare() -> object:
        model = decoder(tied=False)
        for name, one in model.named_parameters():
            one.requires_grad = "embed" in name
        return model

    task = token_task(bare)
    with pytest.raises(TaskError, match="trains nothing behind the cut"):
        tried_parts(task, settings({"cut": "1"}), initial_parameters(task, 0))
    model = PartedModel(task=picture_task(), config=settings())
    for size in range(1, MAX_LAYOUTS + 1):
        model._known[str(size)] = model.parts(layout_of(pictures()[0][:4])) if size == 1 else model._known["1"]
    with pytest.raises(ProtocolError, match=f"more than {MAX_LAYOUTS} shapes"):
        model.parts(layout_of(pictures()[0][:5]))
    with pytest.raises(ConfigError, match="a shared part has none"):
        PartedModel(task=picture_task(), config=settings()).cloud_state(
            layout_of(pictures()[0][:4]), initial_parameters(picture_task(), 0),
            settings({"cloud_part": "shared"}, proximal_mu=0.1),
        )  # fmt: skip
