"""Triton's model repository: its own proto reads what we write."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from edgefl.errors import ConfigError
from edgefl.models.tensors import TensorInfo
from edgefl.protocols.inference.repository import RepositoryModel, config_text, write_ensemble, write_repository

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def parse(tmp_path_factory):
    """Parse a config.pbtxt by Triton's model_config.proto, in a descriptor pool of the test's own."""
    target = tmp_path_factory.mktemp("proto") / "descriptor"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{HERE}", f"--descriptor_set_out={target}"]
    subprocess.run([*command, "model_config.proto"], check=True, timeout=120)
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(target.read_bytes()).file:
        pool.Add(file)
    kind = message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))
    return lambda text: text_format.Parse(text, kind())


ROWS = RepositoryModel(
    name="tail", version=3, digest="ab" * 32, max_batch=16, max_wait_us=500,
    inputs=[TensorInfo('re"lu', "FP32", (-1, 8, 4)), TensorInfo("scale", "FP16", (-1,))],
    outputs=[TensorInfo("y", "INT64", (-1, -1))],
)  # fmt: skip


def test_a_model_with_free_rows(parse) -> None:
    config = parse(config_text(ROWS))
    assert (config.name, config.backend, config.max_batch_size) == ("tail", "onnxruntime", 16)
    assert [(one.name, list(one.dims)) for one in config.input] == [('re"lu', [8, 4]), ("scale", [1])]
    assert config.input[1].HasField("reshape")
    assert not config.input[0].HasField("reshape")
    assert list(config.input[1].reshape.shape) == []
    types = config.DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_name
    assert [one.data_type for one in config.input] == [types["TYPE_FP32"].number, types["TYPE_FP16"].number]
    assert [(one.name, list(one.dims)) for one in config.output] == [("y", [-1])]
    assert config.dynamic_batching.max_queue_delay_microseconds == 500
    assert config.parameters["release_digest"].string_value == "ab" * 32


@pytest.mark.parametrize("datatype", ["BOOL", "UINT8", "INT8", "FP64", "BF16", "BYTES"])
def test_a_model_with_fixed_sizes_and_every_type(parse, datatype) -> None:
    info = TensorInfo("x", datatype, (1, 3))
    config = parse(config_text(RepositoryModel(name="m", inputs=[info], outputs=[info])))
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert list(config.input[0].dims) == [1, 3]
    name = config.DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_number[config.input[0].data_type].name
    assert name == f"TYPE_{'STRING' if datatype == 'BYTES' else datatype}"


def test_the_layout(parse, tmp_path) -> None:
    file = tmp_path / "stage-2.onnx"
    file.write_bytes(b"model")
    (tmp_path / "stage-2.onnx.data").write_bytes(b"weights")
    folder = write_repository(tmp_path / "repository", ROWS, file)
    assert {str(one.relative_to(folder)) for one in folder.rglob("*")} == {
        "3", "3/model.onnx", "3/stage-2.onnx.data", "config.pbtxt",
    }  # fmt: skip
    assert (folder / "3" / "model.onnx").read_bytes() == b"model"
    assert parse((folder / "config.pbtxt").read_text()).name == "tail"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "a/b"}, "'a/b' cannot be the name of a folder"),
        ({"name": ".."}, "cannot be the name of a folder"),
        ({"version": 0}, "version 0 of model m is invalid"),
        ({"max_batch": 4}, "cannot have max_batch=4: the first dimension of x FP32.1,3. is not free"),
    ],
)
def test_what_cannot_be_written(change, words) -> None:
    info = TensorInfo("x", "FP32", (1, 3))
    with pytest.raises(ConfigError, match=words):
        RepositoryModel(**{"name": "m", "inputs": [info], "outputs": [info], **change})


def test_an_ensemble_passes_tensors_from_model_to_model(parse, tmp_path) -> None:
    info = TensorInfo
    steps = [
        RepositoryModel(name="m-1", version=2, inputs=[info("x", "FP32", (-1, 4))], max_batch=8,
                        outputs=[info("h", "FP32", (-1, 6)), info("early", "FP32", (-1, 2))]),
        RepositoryModel(name="m-2", version=2, inputs=[info("h", "FP32", (-1, 6)), info("mask", "BOOL", (-1, 1))],
                        outputs=[info("y", "FP32", (-1, 3))], max_batch=4),
    ]  # fmt: skip
    whole = write_ensemble(tmp_path, "m", steps)
    assert ([one.name for one in whole.inputs], [one.name for one in whole.outputs]) == (["x", "mask"], ["early", "y"])
    assert (tmp_path / "m" / "2").is_dir()
    config = parse((tmp_path / "m" / "config.pbtxt").read_text())
    assert (config.name, config.platform, config.max_batch_size) == ("m", "ensemble", 4)
    assert not config.HasField("dynamic_batching")
    first, second = config.ensemble_scheduling.step
    assert (first.model_name, first.model_version, dict(first.input_map)) == ("m-1", 2, {"x": "x"})
    assert dict(first.output_map) == {"h": "h", "early": "early"}
    assert (second.model_name, dict(second.input_map)) == ("m-2", {"h": "h", "mask": "mask"})
