"""The service over gRPC, on a tail whose computation is real; also with tritonclient's messages."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path

import grpc
import numpy as np
import pytest

from cloud.dataplane.callers import DEVICE_METADATA, CallerChecks, Callers
from cloud.dataplane.running_calls import RunningCalls
from cloud.generation.service import STREAMS_OF_A_DEVICE, SequenceService, ServedTail
from cloud.servers import PortKind, serve_grpc
from cloud.shares import Shares
from edgefl.offload.generation.stage_info import read_stage
from edgefl.protocols.inference import open_inference_grpc_pb2 as pb
from edgefl.protocols.inference.sequences import SequenceRequest, make_sequence_request
from edgefl.protocols.inference.service import InferenceStub, inference_handler
from edgefl.protocols.inference.tensors import response_tensors

ROWS = np.ones((3, 32), np.float32)


class Client:
    def __init__(self, channel, device, digest) -> None:
        self.stub, self.metadata, self.digest = InferenceStub(channel), ((DEVICE_METADATA, device),), digest

    def message(self, **changes):
        given = {"sequence": "s", "hidden": ROWS, "starts": True, "max_tokens": 20} | changes
        return make_sequence_request("tiny", self.digest, SequenceRequest(**given))

    def stream(self):
        return self.stub.ModelStreamInfer(metadata=self.metadata)


@pytest.fixture
def served(tails, folders, free_port):
    """Serve a tail: yields a function that makes clients, the tail and its process."""

    @contextlib.asynccontextmanager
    async def run(**limits):
        calls, info = RunningCalls(), read_stage(folders / "tail")
        async with tails(**limits) as (tail, process, _):

            def handlers(port, workers):
                checks = CallerChecks(is_known=lambda name, _: name in {"a", "b"}, insecure=True, admit=port.admit)
                service = SequenceService(ServedTail(name="tiny", info=info), tail, Callers(checks, calls, workers))
                return [inference_handler(service, calls.registered)]

            shares = Shares.of(1024, builtin_broker=False)
            kind = PortKind(option="--port", max_message_bytes=1 << 20)
            async with (
                serve_grpc("127.0.0.1", free_port, None, shares, handlers, kind),
                grpc.aio.insecure_channel(f"127.0.0.1:{free_port}") as channel,
            ):
                yield lambda name="a", digest=info.digest: Client(channel, name, digest), tail, process

    return run


async def answer(stream, message):
    await stream.write(message)
    response = await stream.read()
    if response.error_message:
        return response.infer_response.parameters["status"].string_param, response.error_message
    return response_tensors(response.infer_response)["token"].tolist()


def test_a_stream_of_one_sequence_and_what_is_refused_on_it(served) -> None:
    async def run():
        async with served() as (client, tail, _):
            one = client()
            stream = one.stream()
            assert await answer(stream, one.message(wants_token=False)) == [[]]
            ((token,),) = await answer(stream, one.message(starts=False, position=3))
            assert 0 <= token < 260
            for change, status, words in (
                ({"starts": False, "position": 9}, "ABORTED", "continues behind 9"),
                ({"hidden": ROWS * np.nan}, "INVALID_ARGUMENT", "has NaN or infinity"),
                ({"hidden": ROWS[:, :5]}, "INVALID_ARGUMENT", "has shape [1, 3, 5]; expected [1, rows, 32]"),
                ({"max_tokens": 400}, "INVALID_ARGUMENT", "the context has 256"),
            ):
                seen = await answer(stream, one.message(**change))
                assert seen[0] == status
                assert words in seen[1]
            wrong = client(digest="0" * 64)
            status, words = await answer(stream, wrong.message())
            assert status == "FAILED_PRECONDITION"
            assert "use the head and the tail of the same split" in words
            other = one.message()
            other.model_name = "large"
            assert (await answer(stream, other))[0] == "NOT_FOUND"
            assert await answer(stream, one.message(starts=False, position=6, hidden=ROWS[:0], ends=True)) == [[]]
            assert len(tail.sessions) == 0
            stream.cancel()

    asyncio.run(run())


def test_metadata_and_a_unary_call(served) -> None:
    async def run():
        async with served() as (client, _, process):
            one = client()
            about = await one.stub.ModelMetadata(pb.ModelMetadataRequest(name="tiny"), metadata=one.metadata)
            assert [(each.name, each.datatype, list(each.shape)) for each in (*about.inputs, *about.outputs)] == [
                ("hidden", "FP32", [1, -1, 32]), ("token", "INT64", [1, -1])
            ]  # fmt: skip
            assert about.properties["release_digest"] == one.digest
            ready = await one.stub.ServerReady(pb.ServerReadyRequest(), metadata=one.metadata)
            assert ready.ready
            response = await one.stub.ModelInfer(one.message(), metadata=one.metadata)
            assert response_tensors(response)["token"].shape == (1, 1)
            process.is_held = True
            late = one.message(starts=False, position=3)
            late.parameters["timeout"].int64_param = 1000
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await one.stub.ModelInfer(late, metadata=one.metadata)
            assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            with pytest.raises(grpc.aio.AioRpcError, match="has: tiny"):
                await one.stub.ModelReady(pb.ModelReadyRequest(name="x"), metadata=one.metadata)

    asyncio.run(run())


def test_a_device_has_some_streams_and_its_sequences_end_with_the_last(served) -> None:
    async def run():
        async with served() as (client, tail, _):
            one, streams = client(), []
            for number in range(STREAMS_OF_A_DEVICE):
                streams.append(one.stream())
                assert isinstance(await answer(streams[-1], one.message(sequence=f"n{number}")), list)
            too_many = one.stream()
            await too_many.write(one.message())
            with pytest.raises(grpc.aio.AioRpcError, match="has 8 streams here already"):
                await too_many.read()
            other = client("b")
            theirs = other.stream()
            assert isinstance(await answer(theirs, other.message(sequence="n0")), list)
            due_s = {one.device: one.due_s for one in map(tail.sessions.get, "ab", ["n0"] * 2)}
            for stream in streams:
                stream.cancel()
            while tail.sessions.get("a", "n0").due_s == due_s["a"]:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            assert tail.sessions.get("a", "n0").due_s < due_s["a"]
            assert tail.sessions.get("b", "n0").due_s == due_s["b"]
            theirs.cancel()

    asyncio.run(run())


def test_a_stranger_is_refused(served) -> None:
    async def run():
        async with served() as (client, *_):
            one = client("stranger")
            stream = one.stream()
            await stream.write(one.message())
            with pytest.raises(grpc.aio.AioRpcError, match="'stranger' is not enrolled"):
                await stream.read()

    asyncio.run(run())


def test_an_unmodified_triton_client_has_a_sequence(served, tmp_path, free_port) -> None:
    pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")
    np.save(tmp_path / "hidden.npy", ROWS)

    async def run():
        async with served() as (client, tail, _):
            one = client()
            stream = one.stream()
            expected = await answer(stream, one.message())
            expected += await answer(stream, one.message(starts=False, position=3, hidden=ROWS[:1]))
            stream.cancel()
            script = Path(__file__).with_name("triton_client.py")
            process = await asyncio.create_subprocess_exec(
                sys.executable, script, str(free_port), one.digest, tmp_path / "hidden.npy",
                stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
            )  # fmt: skip
            out, errors = await process.communicate()
            assert process.returncode == 0, errors.decode()
            assert tail.sessions.get("a", "7") is None  # it ended its sequence
            return [int(line) for line in out.split()], [token for (token,) in expected]

    seen, expected = asyncio.run(run())
    assert seen == expected
