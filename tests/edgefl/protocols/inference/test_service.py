"""The service of the Open Inference Protocol: code generated from today's proto, and its stub."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pb2

from edgefl.protocols import fleet_pb2
from edgefl.protocols.inference import open_inference_grpc_pb2 as pb
from edgefl.protocols.inference.service import InferenceStub

ROOT = Path(__file__).parents[4]


@pytest.mark.parametrize(
    ("generated", "source"),
    [(pb, "edgefl/protocols/inference/open_inference_grpc.proto"), (fleet_pb2, "edgefl/protocols/fleet.proto")],
)
def test_generated_code_is_of_the_proto_file(generated, source, tmp_path) -> None:
    target = tmp_path / "descriptor"
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--descriptor_set_out={target}", source]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    (compiled,) = descriptor_pb2.FileDescriptorSet.FromString(target.read_bytes()).file
    kept = descriptor_pb2.FileDescriptorProto.FromString(generated.DESCRIPTOR.serialized_pb)
    for file in (compiled, kept):
        _forget_json_names(file.message_type)
    assert kept == compiled


def _forget_json_names(messages) -> None:
    """Remove what protoc writes only into a descriptor set."""
    for message in messages:
        for field in (*message.field, *message.extension):
            field.ClearField("json_name")
        _forget_json_names(message.nested_type)


def test_the_numbers_of_fields_are_the_protocol_s() -> None:
    """As in Triton's grpc_service.proto: a client with its own generated code reads our messages."""
    fields = {one.name: one.number for one in pb.ModelInferRequest.DESCRIPTOR.fields}
    assert fields == {
        "model_name": 1, "model_version": 2, "id": 3, "parameters": 4, "inputs": 5, "outputs": 6,
        "raw_input_contents": 7,
    }  # fmt: skip
    assert {one.name: one.number for one in pb.ModelStreamInferResponse.DESCRIPTOR.fields} == {
        "error_message": 1, "infer_response": 2,
    }  # fmt: skip


def test_a_stub_has_the_methods_of_the_service() -> None:
    with grpc.insecure_channel("127.0.0.1:1") as channel:
        stub = InferenceStub(channel)
        assert callable(stub.ModelInfer)
        assert callable(stub.ModelStreamInfer)
        with pytest.raises(AttributeError, match="has no method 'Infer'; it has: ServerLive"):
            stub.Infer  # noqa: B018 - reading it raises
