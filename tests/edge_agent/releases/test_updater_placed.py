"""Placed releases on a device: it fetches what its placement needs, never the whole model."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from edge_agent.placement.placed_file import file_of
from edge_agent.releases.slots import ModelSlots
from edgefl.protocols.inference.placement import Fallback, ModelPart, Offload, Placement
from edgefl.protocols.manifest import Desired, Release, sign
from edgefl.protocols.messages import BlobRef


class Prepared:
    """What was switched to: the files that the serving process would load."""

    def __init__(self, device) -> None:
        self.device, self.served = device, []

    async def prepare(self, model, *, trial):
        for path, sample in model.files():
            await asyncio.to_thread(path.read_bytes)
            assert sample is None or sample.exists()
        return dataclasses.make_dataclass("Ready", ["switch", "forget"])(
            lambda: self.served.append(model), lambda: None
        )

    def drop(self, name):
        raise AssertionError(name)


@pytest.fixture
def placed(fleet):
    """`placed(version)`: a signed wish for a split release, whose whole model the cloud does not even have."""

    def part(text):
        return ModelPart(blob=fleet.blob(text.encode()), sample=fleet.blob(f"sample of {text}".encode()))

    def make(version, use="split:h", **more):
        absent = BlobRef(sha256="0" * 64, size=10**12)  # a terabyte
        split = Placement(name="split:h", layers=2, head=part(f"head {version}"), crossing=["h"], form="fp16",
                          device_bytes=1000)  # fmt: skip
        whole = Placement(name="device", layers=5, head=ModelPart(blob=absent, sample=absent), device_bytes=10**12)
        offload = Offload(use=use, placements=[split, whole], fallback=Fallback(part=part("small")))
        release = Release(model="digits", version=version, blob=absent, inputs={"x": "FP32[1]"},
                          outputs={"y": "FP32[1]"}, offload=offload)  # fmt: skip
        return sign(Desired(device="cam-1", release=release, sequence=more.pop("sequence", version), **more), fleet.key)

    return make


def run_with_host(on_device, device_deps, function):
    async def run(device):
        host = Prepared(device)
        device.updater._deps = dataclasses.replace(device.updater._deps, host=host, **device_deps)
        await function(device, host)

    on_device(run)


def test_head_and_fall_back_are_fetched_and_rolled_back(home, on_device, placed) -> None:
    async def run(device, host):
        await device.install(placed(1), placed(2))
        assert [state for _, state in device.states()] == ["downloading", "installed", "active"] * 2
        slots = ModelSlots(home / "models", "digits")
        assert (slots.state.active, slots.state.serving.version) == ("b", 2)
        folder = home / "models" / "digits" / "b"
        assert {one.name for one in folder.iterdir()} == {
            "head-2.onnx", "head-2.safetensors", "fallback.onnx", "fallback.safetensors",
        }  # fmt: skip
        assert (folder / "head-2.onnx").read_text() == "head 2"
        assert file_of(host.served[-1].placed).placements == ["split:h"]
        await device.install(placed(1, sequence=3, rollback=True))
        assert ModelSlots(home / "models", "digits").state.serving.version == 1
        assert (folder.parent / "a" / "head-2.onnx").read_text() == "head 1"

    run_with_host(on_device, {}, run)


def test_auto_takes_what_fits_into_the_memory_and_a_wish_is_followed(home, on_device, placed) -> None:
    async def run(device, host):
        await device.install(placed(1, use="auto"))  # the whole model would not fit, so it is not fetched
        assert file_of(host.served[-1].placed).placements == ["split:h"]
        device.updater._deps = dataclasses.replace(device.updater._deps, placement="split:other")
        await device.install(placed(2))
        assert "has no placement 'split:other'; it has: auto, split:h, device" in device.notes[-1].detail
        device.updater._deps = dataclasses.replace(device.updater._deps, placement="auto", serving_bytes=999)
        await device.install(placed(3))
        assert "no placement of the release fits into this device's memory" in device.notes[-1].detail
        assert [one.version for one in host.served] == [1]

    run_with_host(on_device, {"serving_bytes": 10_000}, run)


def test_another_placement_than_before_is_fetched_again_after_a_restart(home, on_device, placed) -> None:
    async def first(device, host):
        await device.install(placed(1))

    run_with_host(on_device, {}, first)
    state = ModelSlots(home / "models", "digits").state
    changed = dataclasses.replace(state.slots["a"], placements=["device"])
    ModelSlots(home / "models", "digits").save(dataclasses.replace(state, slots={"a": changed}))

    async def second(device, host):
        device.host.prepare = host.prepare
        await device.install(placed(1))  # the cloud tells it again, as always after a connect
        assert file_of(host.served[-1].placed).placements == ["split:h"]

    run_with_host(on_device, {}, second)
