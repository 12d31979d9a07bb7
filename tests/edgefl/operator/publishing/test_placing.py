"""What is published of a placed model: its parts, each compared and judged, and what is refused before the upload."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest
from onnx import TensorProto

from edgefl.app.offload.publish import publish as command
from edgefl.errors import CloudRefused, ConfigError
from edgefl.models.sample import read_sample
from edgefl.models.session import new_session
from edgefl.offload.source import source_of_file
from edgefl.operator.client import CloudClient
from edgefl.operator.credentials import load_credentials
from edgefl.operator.publishing.placing import PlacingRequest, make_placed, placements_text, publish_placed
from edgefl.protocols.fields import from_json
from edgefl.protocols.manifest import Release
from tests.edgefl.offload.graphs import node, rows, value, weight, write

OUTPUT = value("y", ("n", 3))


@pytest.fixture
def files(tmp_path):
    nodes = [node("MatMul", "x a", "xa"), node("Relu", "xa", "h"), node("MatMul", "h b", "y")]
    weights = [weight("a", 4, 4), weight("b", 4, 3, seed=1)]
    return {
        "whole": write(tmp_path / "m.onnx", nodes, ["x"], [OUTPUT], weights),
        "small": write(tmp_path / "small.onnx", [node("MatMul", "x c", "y")], ["x"], [OUTPUT], [weight("c", 4, 3)]),
        "exit": write(tmp_path / "exit.onnx", [node("MatMul", "h c", "y")], ["h"], [OUTPUT], [weight("c", 4, 3)]),
        "other": write(tmp_path / "other.onnx", [node("Relu", "x", "y")], ["x"], ["y"]),
    }


@pytest.fixture
def make(files, tmp_path):
    def run(**fields):
        fields = {"name": "m", "cuts": ["split:Relu_h"], "stages": ["10.0.0.1:9450"]} | fields
        if "fallback" in fields:
            fields["fallback"] = files[fields["fallback"]]
        folder = tmp_path / "parts"
        folder.mkdir()
        request = PlacingRequest(**fields)
        return make_placed(source_of_file(files["whole"]), request, folder), request

    return run


def test_a_split_with_a_fall_back_everything_on_both_sides_and_what_is_signed(make, files, http_plane) -> None:
    placed, request = make(fallback="small", whole_on=("device", "cloud"), threshold=0.9, form="int8", max_drop=1.0)
    offload = placed.offload
    assert (offload.use, offload.threshold, offload.divides) == ("auto", 0.9, True)
    assert [(one.name, one.layers, one.form, [*one.crossing]) for one in offload.placements] == [
        ("cloud", 0, "int8", ["x"]), ("split:Relu_h", 2, "int8", ["h"]), ("device", 3, "", []),
    ]  # fmt: skip
    assert placed.parts.keys() == {"device", "head-2", "fallback"}
    head, sample = placed.parts["head-2"]
    (seen,) = new_session(head).run(["h"], {"x": rows(2)})
    assert seen.shape == (2, 4)
    assert read_sample(sample, "head").cases[0].outputs.keys() == {"h"}
    with CloudClient(http_plane.url, load_credentials(http_plane.credentials)) as client:
        release = publish_placed(client, placed, request)
        again = publish_placed(client, placed, request)
    signed = from_json(Release, release)
    assert (signed.version, again["version"]) == (1, 2)
    assert signed.blob.sha256 == hashlib.sha256(placed.file.read_bytes()).hexdigest()
    assert signed.offload.placement("device").head.blob == signed.blob
    for part in signed.offload.all_parts().values():
        assert http_plane.blobs.has(part.blob.sha256)
        assert http_plane.blobs.has(part.sample.sha256)
    assert http_plane.registry.release("m", 1).offload == signed.offload
    assert placements_text(offload)[1].startswith("split:Relu_h: 2 layers on the device, ")


def test_parts_that_were_not_uploaded_are_refused(make, http_plane) -> None:
    placed, request = make()
    placed = dataclasses.replace(placed, parts={})
    credentials = load_credentials(http_plane.credentials)
    refused = pytest.raises(CloudRefused, match=r"part head-2 .* is not in the cloud")
    with CloudClient(http_plane.url, credentials) as client, refused:
        publish_placed(client, placed, request)


def test_an_exit_behind_the_cut(make) -> None:
    placed, _ = make(fallback="exit")
    assert placed.offload.fallback.behind == "split:Relu_h"
    assert placed.offload.use == "split:Relu_h"
    assert placed.parts.keys() == {"head-2", "fallback"}


def test_a_format_that_costs_too_much_is_not_taken(files, tmp_path) -> None:
    """One value in each row is so large that eight bits leave nothing of the others."""
    nodes = [node("Mul", "x far", "h"), node("Mul", "h near", "y")]
    far = weight("far", 1, 4)
    far.raw_data = np.array([[1, 1, 1, 30_000]], np.float32).tobytes()
    near = weight("near", 1, 4)
    near.raw_data = np.array([[1, 1, 1, 0]], np.float32).tobytes()
    path = write(tmp_path / "far.onnx", nodes, ["x"], ["y"], [far, near])
    (tmp_path / "one").mkdir()
    request = PlacingRequest(name="m", cuts=["split:Mul_h"], max_drop=0.001)
    placed = make_placed(source_of_file(path), request, tmp_path / "one")
    assert placed.offload.placements[0].form in {"fp16", "fp32"}
    (tmp_path / "two").mkdir()
    with pytest.raises(ConfigError, match=r"no wire format at the cut behind layer 1 is allowed .int8: "):
        make_placed(source_of_file(path), dataclasses.replace(request, form="int8"), tmp_path / "two")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"cuts": []}, "name a cut, --cut split:NODE"),
        ({"cuts": ["split:none"]}, "m.onnx has no cut 'split:none'"),
        ({"name": "M M"}, "'M M' cannot be a model's name"),
        ({"threshold": 0.5}, "--cascade needs a small model"),
        ({"form": "int4"}, "--format 'int4' is not one of: auto, fp32"),
        ({"objective": "joy"}, "--objective 'joy' is not one of: latency"),
        ({"stages": ["nowhere"]}, "--stages: 'nowhere' is no address of a stage server"),
        ({"fallback": "other"}, r"the fall-back other.onnx returns y FP32\[-1,4\]; expected the model's own outputs"),
        ({"use": "device"}, "use is 'device', expected auto or one of: split:Relu_h"),
    ],
)
def test_what_cannot_be_published(make, fields, words) -> None:
    with pytest.raises((ConfigError, ValueError), match=words):
        make(**fields)


def test_a_fall_back_with_other_inputs(make, files, tmp_path) -> None:
    nodes, inputs = [node("MatMul", "z c", "y")], [value("z", ("n", 4), TensorProto.FLOAT)]
    files["strange"] = write(tmp_path / "strange.onnx", nodes, inputs, [OUTPUT], [weight("c", 4, 3)])
    with pytest.raises(ConfigError, match=r"takes z FP32\[-1,4\]; expected the model's inputs, or what crosses"):
        make(fallback="strange")


def test_its_options_are_documented() -> None:
    assert all(one.help for one in command.params if one.param_type_name == "option")
