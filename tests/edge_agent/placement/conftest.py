"""A small model in its parts, and a stage server in this process whose faults a test chooses."""

from __future__ import annotations

import asyncio
import contextlib
import random
from types import SimpleNamespace

import grpc
import numpy as np
import pytest

from edge_agent.placement.placed_model import PlacedModel, PlacedRelease
from edge_agent.placement.tail_client import TailClient
from edge_agent.sessions import load
from edgefl.models.session import new_session
from edgefl.models.tensors import TensorInfo
from edgefl.offload.stages import split_model
from edgefl.offload.wire import FORMATS, decode
from edgefl.protocols.inference import open_inference_grpc_pb2 as pb
from edgefl.protocols.inference.placement import Fallback, ModelPart, Offload, Placement
from edgefl.protocols.inference.service import inference_handler
from edgefl.protocols.inference.tensors import add_output, datatype_of, request_tensors
from edgefl.protocols.messages import BlobRef
from tests.edgefl.offload.graphs import cuts_of, node, value, weight, write

DIGEST = "ab" * 32
PART = ModelPart(blob=BlobRef(sha256="1" * 64, size=1), sample=BlobRef(sha256="2" * 64, size=1))
IN_CLOUD = Placement(name="cloud", layers=0, crossing=["x"], form="fp32", cloud_ms=1.0)
SPLIT = Placement(name="split:Relu_h", layers=2, head=PART, crossing=["h"], form="fp32", device_ms=0.5, cloud_ms=0.5)
WHOLE = Placement(name="device", layers=3, head=PART, device_ms=1.0)
OUTPUT = value("y", ("n", 3))


def inputs(rows=1, seed=5):
    return {"x": np.random.default_rng(seed).normal(size=(rows, 4)).astype(np.float32)}


@pytest.fixture
def files(tmp_path):
    """y = relu(x a) b: the whole, its two stages, and a small model x c; an exit takes h."""
    nodes = [node("MatMul", "x a", "xa"), node("Relu", "xa", "h"), node("MatMul", "h b", "y")]
    whole = write(tmp_path / "m.onnx", nodes, ["x"], [OUTPUT], [weight("a", 4, 4), weight("b", 4, 3, seed=1)])
    graph, cuts = cuts_of(whole, inputs())
    split = split_model(graph, cuts[1], tmp_path)
    small = write(tmp_path / "small.onnx", [node("MatMul", "x c", "y")], ["x"], [OUTPUT], [weight("c", 4, 3, seed=7)])
    early = write(tmp_path / "exit.onnx", [node("MatMul", "h c", "y")], ["h"], [OUTPUT], [weight("c", 4, 3, seed=8)])
    return {"whole": whole, "head": split.head, "tail": split.tail, "small": small, "exit": early}


class StageServer:
    """Speaks the protocol as a stage server does; `fault` is what it does instead of an answer."""

    def __init__(self, files) -> None:
        self._sessions = {"m.2": new_session(files["tail"]), "m.0": new_session(files["whole"])}
        self.fault, self.delay_s, self.digest, self.formats = None, 0.0, DIGEST, ",".join(FORMATS)
        self.seen, self.running, self.most = [], 0, 0  # requests; at the same time now, and at most
        self.timeouts_s = []
        self.num_pings = 0

    async def ServerLive(self, _request, _context):  # noqa: N802
        self.num_pings += 1
        return pb.ServerLiveResponse(live=True)

    ServerReady = ServerMetadata = ModelReady = ServerLive

    async def ModelMetadata(self, request, _context):  # noqa: N802
        properties = {"release_digest": self.digest, "wire_formats": self.formats} if self.formats else {}
        return pb.ModelMetadataResponse(name=request.name, properties=properties)

    async def ModelInfer(self, requests, context):  # noqa: N802
        request = pb.ModelInferRequest.FromString(await anext(requests))
        self.seen.append(request)
        self.timeouts_s.append(context.time_remaining())
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(self.delay_s)
            if callable(self.fault):
                return self.fault(request)
            if self.fault is not None:
                await context.abort(grpc.StatusCode[self.fault], "as the test wishes")
            tensors = request_tensors(request)
            if "wire_format" in request.parameters:
                tensors = decode(tensors["crossing"].data)
            (outputs,) = self._sessions[request.model_name].run(["y"], tensors)
            return answer(request, outputs)
        finally:
            self.running -= 1

    async def ModelStreamInfer(self, requests, context):  # noqa: N802
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "no streams")


def answer(request, outputs, name="y", server_us=500):
    response = pb.ModelInferResponse(model_name=request.model_name, id=request.id)
    response.parameters["server_us"].int64_param = server_us
    add_output(response, (name, datatype_of(outputs.dtype), outputs.shape), outputs.tobytes())
    return response


async def compute(model, names, feeds):
    """Run a part of a model, as the serving process does."""
    await asyncio.sleep(0)
    return model.run(names, feeds)


@pytest.fixture
def placed(files):
    """Run a stage server, and a model that uses it, within the block."""

    @contextlib.asynccontextmanager
    async def run(*candidates, fallback="small", addresses=None, **fields):
        server = StageServer(files)
        grpc_server = grpc.aio.server()
        grpc_server.add_generic_rpc_handlers((inference_handler(server),))
        port = grpc_server.add_insecure_port("127.0.0.1:0")
        await grpc_server.start()
        places = list(candidates or (SPLIT,))
        parts = {"head-2": load("m", 1, files["head"]), "head-3": load("m", 1, files["whole"])}
        if fallback:
            parts["fallback"] = load("m", 1, files[fallback])
            behind = "split:Relu_h" if fallback == "exit" else ""
            fields["fallback"] = Fallback(part=PART, behind=behind)
        fields = {"use": places[0].name, "timeout_ms": 60_000.0, "divides": True} | fields
        release = PlacedRelease(
            name="m", version=1, digest=DIGEST, inputs=(TensorInfo("x", "FP32", (-1, 4)),),
            outputs=(TensorInfo("y", "FP32", (-1, 3)),), offload=Offload(placements=places, **fields),
            candidates=tuple(places),
        )  # fmt: skip
        tail = TailClient(addresses or [f"127.0.0.1:{port}"], None, "cam")
        model = PlacedModel(release, parts, tail, random.Random(1))
        try:
            yield model, server, SimpleNamespace(grpc=grpc_server, port=port)
        finally:
            await grpc_server.stop(None)
            await tail.close()

    return run


@pytest.fixture
def expected(files):
    """Return what a file computes of inputs."""
    return lambda name, feeds: new_session(files[name]).run(["y"], dict(feeds))[0]
