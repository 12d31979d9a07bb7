"""Releases on a base: the device fetches the patch alone, and the whole file where that cannot be used."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from types import SimpleNamespace

import numpy as np
import pytest

from edge_agent.releases.slots import ModelSlots
from edgefl.models.adapters.patch import Move, added, make_patch
from edgefl.offload.generation.stage_info import WEIGHTS_FILE
from edgefl.protocols.inference.texts import TextStage
from edgefl.trees import Factors, write_tree


@pytest.fixture
def on_base(fleet, onnx_model, tmp_path):
    """`on_base(n)`: version n as a patch of version 1, which answers 1 with n + 1."""

    def make(version: int, *, spoil=lambda patch: patch, base: float = 1.0):
        paths = [tmp_path / name for name in ("base", "new")]
        for path, scale in zip(paths, (1.0, float(version)), strict=True):
            path.write_bytes(onnx_model(scale))
        file = io.BytesIO()
        write_tree(make_patch(*paths, []), file)
        return fleet.release(
            onnx_model(float(version)), version, sequence=version, base=onnx_model(base), patch=spoil(file.getvalue())
        )

    return make


def fetched(fleet) -> list[str]:
    """The blobs that the device has fetched."""
    return [one.split()[1] for one in fleet.calls if one.startswith("download ")]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:8]


def test_the_patch_alone_is_fetched_and_the_base_is_kept(fleet, home, on_device, versions, on_base, onnx_model):
    async def run(device):
        await device.install(versions(1))
        for version in (2, 3, 4):  # the slot that held the base is used again
            await device.install(on_base(version))
            assert device.predict() == version + 1
        whole = {digest(onnx_model(float(version))) for version in (2, 3, 4)}
        assert whole.isdisjoint(fetched(fleet))
        kept = ModelSlots(home / "models", "digits").base_path()
        assert kept.read_bytes() == onnx_model(1.0)
        assert [one.name for one in kept.parent.iterdir() if "patch" in one.name or "new" in one.name] == []

    on_device(run)


def test_a_complete_download_leaves_the_kept_base_as_it_is(fleet, home, on_device, versions, on_base, onnx_model):
    async def run(device):
        await device.install(versions(1), on_base(2), versions(3), versions(4))
        assert ModelSlots(home / "models", "digits").base_path().read_bytes() == onnx_model(1.0)
        await device.install(on_base(5))
        assert device.predict() == 6
        assert digest(onnx_model(5.0)) not in fetched(fleet)

    on_device(run)


@pytest.mark.parametrize(
    "spoil", [lambda patch: patch[:-1], lambda patch: b"no tree" * 9, lambda patch: patch[:-1] + b"\1"],
    ids=["cut", "no tree", "another file"],
)  # fmt: skip
def test_a_patch_that_does_not_make_the_signed_file_costs_a_complete_download(
    fleet, on_device, versions, on_base, onnx_model, spoil
):
    async def run(device):
        await device.install(versions(1), on_base(2, spoil=spoil))
        assert device.predict() == 3
        assert digest(onnx_model(2.0)) in fetched(fleet)

    on_device(run)


def test_without_the_base_the_file_is_fetched(fleet, on_device, versions, on_base, onnx_model):
    async def run(device):
        await device.install(on_base(2))
        assert device.predict() == 3
        assert fetched(fleet) == [digest(onnx_model(2.0))]

    on_device(run)


def test_a_base_that_was_damaged_is_not_used(fleet, home, on_device, versions, on_base, onnx_model):
    async def run(device):
        await device.install(versions(1), on_base(2), versions(3))
        ModelSlots(home / "models", "digits").base_path().write_bytes(b"damaged")
        await device.install(on_base(4))
        assert device.predict() == 5
        assert digest(onnx_model(4.0)) in fetched(fleet)

    on_device(run)


def test_a_head_of_a_language_model_is_made_of_its_base(fleet, home, on_device) -> None:
    rng = np.random.default_rng(0)
    base = {"model.embed.weight": rng.normal(size=(64, 16)).astype(np.float32)}
    pair = Factors(rng.normal(size=(64, 2)).astype(np.float32), rng.normal(size=(2, 16)).astype(np.float32))
    moved = {name: added(weight, pair) for name, weight in base.items()}
    files = [home / name for name in ("old", "new")]
    for path, tree in zip(files, (base, moved), strict=True):
        with path.open("wb") as file:
            write_tree(tree, file)
    moves = [Move(name, weight, pair) for name, weight in base.items()]
    patch = io.BytesIO()
    write_tree(make_patch(*files, moves), patch)
    old, new = (path.read_bytes() for path in files)
    other = old[:-4] + bytes(4)  # which its patch does not make: the whole is fetched
    stage = TextStage(record=fleet.blob(b"record"), tokenizer=fleet.blob(b"tokenizer"))
    wishes = [
        fleet.release(old, 1, sequence=1, model="tiny", text=stage),
        fleet.release(new, 2, sequence=2, model="tiny", text=stage, base=old, patch=patch.getvalue()),
        fleet.release(other, 3, sequence=3, model="tiny", text=stage, base=old, patch=patch.getvalue()),
    ]

    class Texts:
        """The process that generates texts: it is given the folder."""

        async def prepare(self, model, *, trial):
            served.append((model.folder / WEIGHTS_FILE).read_bytes())
            return SimpleNamespace(switch=lambda: None, forget=lambda: None)

    async def run(device):
        device.updater._deps = dataclasses.replace(device.updater._deps, host=Texts())
        await device.install(*wishes)

    served = []
    on_device(run)
    assert served == [old, new, other]
    whole = {digest(one) for one in (old, new, other)}
    assert [one for one in fetched(fleet) if one in whole] == [digest(old), digest(other)]
