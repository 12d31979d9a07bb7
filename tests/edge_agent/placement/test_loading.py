"""The parts of a placed release are loaded, each is compared with its own sample, and addresses are checked."""

from __future__ import annotations

import dataclasses
import random
import shutil

import numpy as np
import pytest

from edge_agent.placement.loading import load_placed, sample_inputs
from edge_agent.placement.placed_file import PlacedFile, text_of
from edge_agent.serving.wire import LoadModel, TailAccess
from edgefl.errors import ProtocolError
from edgefl.models.sample import Case, Sample, write_sample
from edgefl.models.session import new_session
from edgefl.protocols.inference.placement import Fallback, Offload
from tests.edge_agent.placement.conftest import DIGEST, PART, SPLIT, inputs

OFFLOAD = Offload(use=SPLIT.name, placements=[SPLIT], stages=["10.0.0.1:9450"], fallback=Fallback(part=PART))
PLACED = PlacedFile(
    digest=DIGEST, offload=OFFLOAD, placements=[SPLIT.name], inputs={"x": "FP32[-1,4]"}, outputs={"y": "FP32[-1,3]"}
)


@pytest.fixture
def slot(files, tmp_path):
    """A slot's folder with a head, a fall-back and the sample of the whole."""
    folder = tmp_path / "a"
    folder.mkdir()
    for part, name in (("head-2", "head"), ("fallback", "small"), ("sample", "whole")):
        session = new_session(files[name])
        outputs = dict(zip([one.name for one in session.get_outputs()], session.run(None, dict(inputs())), strict=True))
        sample = Sample((Case(inputs(), outputs),), dict.fromkeys(outputs, 1e-3))
        write_sample(sample, folder / f"{part}.safetensors")
        if part != "sample":
            shutil.copyfile(files[name], folder / f"{part}.onnx")
    return folder


def request(slot, placed=PLACED):
    return LoadModel(
        id=1, name="m", version=4, path=str(slot / "model.onnx"), sample=str(slot / "sample.safetensors"),
        placed=text_of(placed),
    )  # fmt: skip


def load(slot, placed=PLACED, **access):
    return load_placed(request(slot, placed), TailAccess(**access), random.Random(1))


def test_what_is_loaded(slot) -> None:
    model = load(slot)
    assert (model.name, model.version, model.release.digest) == ("m", 4, DIGEST)
    assert model.parts.keys() == {"head-2", "fallback"}
    assert [str(one) for one in (*model.inputs, *model.outputs)] == ["x FP32[-1,4]", "y FP32[-1,3]"]
    assert model.tail.address == "10.0.0.1:9450"
    assert (model.fallback, model.whole) == (model.parts["fallback"], None)
    assert all(one.run_s > 0 for one in model.parts.values())
    assert model.reserve_s() > 0
    assert sample_inputs(request(slot))["x"].tolist() == inputs()["x"].tolist()
    assert sample_inputs(dataclasses.replace(request(slot), sample="")) == {}


def test_the_agent_s_own_stage_servers_come_first(slot) -> None:
    assert load(slot, addresses=["10.0.0.2:9450"]).tail.address == "10.0.0.2:9450"
    with pytest.raises(ProtocolError, match=r"'10.0.0.2' is no address of a stage server"):
        load(slot, addresses=["10.0.0.2"])


def test_a_part_that_does_not_compute_what_its_publisher_saw(slot) -> None:
    sample = Sample((Case(inputs(), {"y": np.zeros((1, 3), np.float32)}),), {"y": 1e-3})
    write_sample(sample, slot / "fallback.safetensors")
    with pytest.raises(ProtocolError, match="does not compute here what its publisher saw"):
        load(slot)


def test_a_release_that_does_not_say_what_it_takes(slot) -> None:
    with pytest.raises(ProtocolError, match="does not say what the model takes and returns"):
        load(slot, dataclasses.replace(PLACED, inputs={}))
    with pytest.raises(ProtocolError, match=r"is described as 'FP32'; expected a text such as FP32\[-1,3\]"):
        load(slot, dataclasses.replace(PLACED, inputs={"x": "FP32"}))
