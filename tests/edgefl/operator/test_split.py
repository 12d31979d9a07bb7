"""What is uploaded of a job in parts: each tensor once, by who has it."""

from __future__ import annotations

from edgefl.operator.split import divided_tensors
from edgefl.training.local import initial_parameters
from tests.cloud.split.bench import settings
from tests.edgefl.offload.training.models import NormedNet, decoder, picture_task, token_task


def test_all_tensors_are_uploaded_and_the_cloud_knows_its_own() -> None:
    task = token_task(lambda: decoder(tied=False))
    found = divided_tensors(task, settings({"cut": "1"}))
    assert {*found.moving, *found.others} == set(initial_parameters(task, 0))
    assert set(found.moving) & set(found.others) == set()
    assert found.in_cloud == {name: name for name in found.others}
    assert found.cloud_buffers == []


def test_buffers_of_both_sides_and_a_frozen_device_part() -> None:
    task = picture_task(NormedNet)
    here = divided_tensors(task, settings({"cut": "norm"}))
    assert "norm.running_mean" in here.buffers
    there = divided_tensors(task, settings({"cut": "first"}))
    assert there.cloud_buffers == ["norm.num_batches_tracked", "norm.running_mean", "norm.running_var"]
    frozen = divided_tensors(task, settings({"cut": "first", "device_part": "frozen"}))
    assert frozen.moving == {}
    assert set(frozen.on_device) == {"first.weight", "first.bias"}
    assert set(frozen.on_device) <= set(frozen.others)
