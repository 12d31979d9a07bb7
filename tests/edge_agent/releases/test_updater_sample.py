"""Releases with a sample: tried on it before they serve, and whenever they are loaded again."""

from __future__ import annotations

import numpy as np
import pytest

from edge_agent.releases.slots import ModelSlots
from edgefl.models.sample import Case, Sample, write_sample


@pytest.fixture
def sampled(fleet, onnx_model, tmp_path):
    """`sampled(n, says=y)`: version n, which answers 1 with n + 1, with a sample that says it answers y."""

    def make(version: int, *, says: float | None = None, **options):
        ones = np.ones((1, 3), np.float32)
        outputs = {"y": ones * np.float32(version + 1 if says is None else says)}
        write_sample(Sample((Case({"x": ones}, outputs),), {"y": 1e-3}), tmp_path / "sample")
        content = (tmp_path / "sample").read_bytes()
        return fleet.release(onnx_model(float(version)), version, sample=content, **{"sequence": version, **options})

    return make


def test_a_release_is_tried_on_its_sample_and_restored_with_it(fleet, home, on_device, sampled):
    async def run(device):
        await device.install(sampled(1), sampled(2))
        assert device.predict() == 3
        state = ModelSlots(home / "models", "digits").state
        assert state.slots.keys() == {"a", "b"}
        assert state.slots["a"].sample != state.slots["b"].sample

    on_device(run)
    fleet.stop()

    async def restored(device):
        assert device.predict() == 3

    on_device(restored)


def test_a_sample_that_does_not_come_out_refuses_the_release_in_words(on_device, versions, sampled):
    async def run(device):
        await device.install(versions(1), sampled(2, says=9.0))
        [note] = [note for note in device.notes if note.state == "failed"]
        assert "model digits version 2 does not compute here what its publisher saw: output 'y' differs by 6" in (
            note.detail
        )
        assert device.predict() == 2

    on_device(run)


def test_the_same_file_with_another_sample_is_fetched_again(home, on_device, versions, sampled):
    async def run(device):
        await device.install(versions(1), sampled(1, sequence=2))
        state = ModelSlots(home / "models", "digits").state
        assert (state.active, state.slots["a"].sample) == ("b", None)
        assert device.predict() == 2

    on_device(run)


def test_a_sample_that_was_damaged_on_disk_has_the_release_sent_again(fleet, home, on_device, sampled):
    wish = sampled(1)
    on_device(lambda device: device.install(wish))
    (home / "models" / "digits" / "a" / "sample.safetensors").write_bytes(b"x")

    async def run(device):
        assert device.models.versions() == {}
        await device.install(wish)
        assert device.predict() == 2

    on_device(run)
