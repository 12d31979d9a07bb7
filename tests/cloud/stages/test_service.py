"""The Open Inference Protocol's service over gRPC, on scripted stages and on a real one."""

from __future__ import annotations

import asyncio
import contextlib
import math
import re

import grpc
import numpy as np
import pytest

from cloud.dataplane.callers import DEVICE_METADATA, CallerChecks, Callers
from cloud.dataplane.running_calls import RunningCalls
from cloud.servers import PortKind, serve_grpc
from cloud.shares import Shares
from cloud.stages import service as module
from cloud.stages.service import ServedModel, StageService
from edgefl.offload.wire import encode
from edgefl.protocols.inference import open_inference_grpc_pb2 as pb
from edgefl.protocols.inference.service import InferenceStub, inference_handler
from edgefl.protocols.inference.tensors import make_request, response_tensors
from tests.cloud.stages.conftest import rows

DIGEST = "ab" * 32


class Client:
    """A device's stub."""

    def __init__(self, channel, device) -> None:
        self.channel, self.stub, self.metadata = channel, InferenceStub(channel), ((DEVICE_METADATA, device),)

    def infer(self, request, timeout_s=60.0):
        return self.stub.ModelInfer(request, metadata=self.metadata, timeout=timeout_s)

    def stream(self):
        return self.stub.ModelStreamInfer(metadata=self.metadata)


@pytest.fixture
def served(scripted, free_port):
    """Serve scripted stages: yields a function that makes clients, and the stages."""

    @contextlib.asynccontextmanager
    async def run(devices=("a", "b"), kind=None, names=None, **options):
        calls = RunningCalls()
        async with scripted(**options) as (pipeline, stages):

            def handlers(port, workers):
                checks = CallerChecks(is_known=lambda name, _: name in devices, insecure=True, admit=port.admit)
                callers = Callers(checks, calls, workers)
                model = ServedModel(name="m", version="3", digest=DIGEST, entries=names or {"m": 0})
                return [inference_handler(StageService(model, pipeline, callers), calls.registered)]

            shares = Shares.of(1024, builtin_broker=False)
            kind_ = kind or PortKind(option="--port", max_message_bytes=1 << 20)
            async with (
                serve_grpc("127.0.0.1", free_port, None, shares, handlers, kind_),
                grpc.aio.insecure_channel(f"127.0.0.1:{free_port}") as channel,
            ):
                yield lambda device="a": Client(channel, device), stages

    return run


async def given(stage, count=1):
    """Wait until a stage has batches."""
    async with asyncio.timeout(60):
        while len(stage.given) < count:  # noqa: ASYNC110 - a test looks from the outside
            await asyncio.sleep(0.002)


@contextlib.asynccontextmanager
async def working(stage):
    """Let a stage compute whatever it is given, within the block."""

    async def work() -> None:
        while True:
            while stage.given:
                stage.finish()
            await asyncio.sleep(0.002)

    task = asyncio.create_task(work())
    yield
    task.cancel()
    await asyncio.wait([task])


def request(*values, **fields):
    return make_request("m", rows(*values), **fields)


async def refusal(call):
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    return refused.value.code().name, refused.value.details()


def test_a_request_and_what_a_client_may_ask_about_the_model(served) -> None:
    async def run():
        async with served() as (client, (stage,)):
            one = client()
            call = asyncio.ensure_future(one.infer(request(1, 2, id="7", model_version="3")))
            await given(stage)
            stage.finish()
            response = await call
            assert (response.model_name, response.model_version, response.id) == ("m", "3", "7")
            assert response_tensors(response)["t1"].tolist() == [[3, 3], [5, 5]]
            about = await one.stub.ModelMetadata(pb.ModelMetadataRequest(name="m"), metadata=one.metadata)
            assert [(info.name, info.datatype, list(info.shape)) for info in (*about.inputs, *about.outputs)] == [
                ("t0", "FP32", [-1, 2]), ("t1", "FP32", [-1, 2]),
            ]  # fmt: skip
            assert dict(about.properties) == {"release_digest": DIGEST, "wire_formats": "fp32,fp16,bf16,int8"}
            for name, kind in (
                ("ServerLive", pb.ServerLiveRequest()), ("ServerReady", pb.ServerReadyRequest()),
                ("ServerMetadata", pb.ServerMetadataRequest()), ("ModelReady", pb.ModelReadyRequest(name="m")),
            ):  # fmt: skip
                reply = await getattr(one.stub, name)(kind, metadata=one.metadata)
                assert getattr(reply, "live", True)
                assert getattr(reply, "ready", True)
            stage.is_up, stage.reason = False, "it was killed"
            assert not (await one.stub.ServerReady(pb.ServerReadyRequest(), metadata=one.metadata)).ready

    asyncio.run(run())


def with_parameter(name, **value):
    one = request(1)
    for field, given_value in value.items():
        setattr(one.parameters[name], field, given_value)
    return one


def with_output(name, parameter=None):
    one = request(1)
    output = one.outputs.add(name=name)
    if parameter:
        output.parameters[parameter].int64_param = 1
    return one


@pytest.mark.parametrize(
    ("wrong", "status", "words"),
    [
        (make_request("other", rows(1)), "NOT_FOUND", "model 'other' is not on this server; it has: m"),
        (request(1, model_version="4"), "NOT_FOUND", "model 'm' has version 3 here, not '4'"),
        (with_parameter("release_digest", string_param="cd"), "FAILED_PRECONDITION", "for the release with digest cd;"),
        (with_parameter("sequence_id", int64_param=5), "INVALID_ARGUMENT", "keeps no state between requests"),
        (with_parameter("timeout", int64_param=-1), "INVALID_ARGUMENT", "parameter 'timeout' is -1; expected micro"),
        (with_parameter("timeout", string_param="5"), "INVALID_ARGUMENT", "parameter 'timeout' is '5'; expected micro"),
        (make_request("m", {"t0": np.zeros((1, 3), np.float32)}), "INVALID_ARGUMENT", r"shape \[1, 3\]; model m takes"),
        (make_request("m", {"t0": np.zeros((1, 2))}), "INVALID_ARGUMENT", "datatype FP64; model m takes FP32"),
        (request(1, math.nan), "INVALID_ARGUMENT", "input 't0' has 2 NaN among its 4 values"),
        (with_output("t9"), "INVALID_ARGUMENT", "output 't9' is unknown; model m has: t1"),
        (with_output("t1", "classification"), "INVALID_ARGUMENT", "asks for classification"),
        (with_parameter("timeout", int64_param=1000), "DEADLINE_EXCEEDED", "the request took longer than 0.001 s"),
    ],
)
def test_requests_that_are_refused_alone_and_on_a_stream(served, wrong, status, words) -> None:
    async def run():
        async with served() as (client, (stage,)):
            code, reason = await refusal(client().infer(wrong))
            assert code == status
            assert re.search(words, reason)
            stream = client().stream()
            for one in (wrong, request(1, id="after")):
                await stream.write(one)
            first = await stream.read()
            assert re.search(words, first.error_message)
            assert first.infer_response.parameters["status"].string_param == status
            await given(stage)
            while stage.given:
                stage.finish()
            assert (await stream.read()).infer_response.id == "after"
            await stream.done_writing()
            assert await stream.read() is grpc.aio.EOF

    asyncio.run(run())


def test_what_is_no_request_and_what_is_too_large(served) -> None:
    async def run():
        async with served() as (client, _):
            raw = client().channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            for data in (b"\xff\xff", b"\x0a\x05m"):
                code, reason = await refusal(raw(data, metadata=client().metadata))
                assert (code, reason) == ("INVALID_ARGUMENT", "the message is not a ModelInferRequest")
            assert await refusal(raw(b"", metadata=client().metadata)) == (
                "NOT_FOUND", "model '' is not on this server; it has: m",
            )  # fmt: skip
            large = make_request("m", {"t0": np.zeros((200_000, 2), np.float32)})
            assert (await refusal(client().infer(large)))[0] == "RESOURCE_EXHAUSTED"

    asyncio.run(run())


def test_a_stranger_is_refused(served) -> None:
    async def run():
        async with served() as (client, _):
            code, reason = await refusal(client("stranger").infer(request(1)))
            assert code == "PERMISSION_DENIED"
            assert "device 'stranger' is not enrolled" in reason
            stream = client("stranger").stream()
            with pytest.raises(grpc.aio.AioRpcError, match="not enrolled"):
                await stream.read()

    asyncio.run(run())


def test_responses_on_a_stream_come_in_order_and_requests_of_a_stream_are_merged(served) -> None:
    async def run():
        async with served() as (client, (stage,)):
            stream = client().stream()
            for number in range(6):
                await stream.write(request(number, id=str(number)))
            await given(stage, 2)
            assert stage.rows() == [[0], [1, 2, 3, 4]]
            async with working(stage):
                for number in range(6):
                    response = (await stream.read()).infer_response
                    assert response.id == str(number)
                    assert response_tensors(response)["t1"][0, 0] == 2 * number + 1

    asyncio.run(run())


def test_a_stage_that_dies_in_mid_stream_ends_no_stream(served) -> None:
    async def run():
        async with served() as (client, (stage,)):
            stream = client().stream()
            await stream.write(request(1))
            await given(stage)
            stage.die()
            failed = await stream.read()
            assert "stage 1 was lost while it had this request: it was killed. Send it again" in failed.error_message
            assert failed.infer_response.parameters["status"].string_param == "UNAVAILABLE"
            stage.come_up()
            await stream.write(request(1))
            await given(stage)
            stage.finish()
            assert not (await stream.read()).error_message

    asyncio.run(run())


def test_the_call_s_deadline_is_the_request_s(served) -> None:
    async def run():
        async with served() as (client, (stage,)):
            assert (await refusal(client().infer(request(1), 0.05)))[0] == "DEADLINE_EXCEEDED"
            assert (await refusal(client("b").infer(request(2), 0.05)))[0] == "DEADLINE_EXCEEDED"
            async with asyncio.timeout(60):
                while any(stage._callbacks._queues.values()):  # noqa: ASYNC110
                    await asyncio.sleep(0.002)

    asyncio.run(run())


def test_a_client_that_goes_away_leaves_nothing_behind(served) -> None:
    async def run():
        async with served() as (client, (stage,)):
            stream = client().stream()
            for number in range(4):
                await stream.write(request(number))
            await given(stage)
            stream.cancel()
            async with asyncio.timeout(60):
                while stage._callbacks._loads:  # noqa: ASYNC110
                    await asyncio.sleep(0.002)
            stage.finish()
            assert stage.rows() == []

    asyncio.run(run())


def test_a_thousand_requests_and_endless_streams_of_one_device_leave_others_alone(served, monkeypatch) -> None:
    monkeypatch.setattr(module, "CALLS_OF_A_DEVICE", 4)
    monkeypatch.setattr(module, "STREAMS_OF_A_DEVICE", 2)

    async def run():
        async with served(max_rows=1) as (client, (stage,)):
            bad = client("a")
            calls = [asyncio.ensure_future(bad.infer(request(1))) for _ in range(20)]
            await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
            refused = [one for one in calls if one.done()]
            code, reason = await refusal(refused[0])
            assert (code, reason) == (
                "RESOURCE_EXHAUSTED", "device a has 4 calls here already, the most that it may have; wait for one",
            )  # fmt: skip
            streams = [bad.stream() for _ in range(2)]
            for one in streams:
                await one.write(request(1))
            await given(stage, 2)
            third = bad.stream()
            with pytest.raises(grpc.aio.AioRpcError, match="has 2 streams here already"):
                await third.read()
            async with working(stage):
                good = await client("b").infer(request(5))
            assert response_tensors(good)["t1"][0, 0] == 11
            for one in (*calls, *streams):
                one.cancel()

    asyncio.run(run())


def test_a_stream_is_not_read_while_many_of_its_requests_wait(served, monkeypatch) -> None:
    monkeypatch.setattr(module, "STREAM_DEPTH", 3)

    async def run():
        async with served() as (client, (stage,)):
            stream = client().stream()
            for number in range(10):
                await stream.write(request(number, id=str(number)))
            await given(stage)
            for _ in range(50):
                await asyncio.sleep(0.002)
            assert stage._callbacks._loads["a"].requests <= 4
            async with working(stage):
                for number in range(10):
                    assert (await stream.read()).infer_response.id == str(number)

    asyncio.run(run())


def crossing(form, **tensors):
    message = np.frombuffer(encode(tensors, form), np.uint8)
    one = make_request("m", {"crossing": message})
    one.parameters["wire_format"].string_param = form
    return one


@pytest.mark.parametrize("form", ["fp32", "fp16", "bf16", "int8"])
@pytest.mark.parametrize("num", [2, 20_000])  # decoded in the event loop, and outside
def test_tensors_at_a_cut_come_in_every_wire_format(served, form, num) -> None:
    async def run():
        async with served(max_rows=20_000) as (client, (stage,)), working(stage):
            values = np.tile(np.array([[1.0, -2.0]], np.float32), (num, 1))
            response = await client().infer(crossing(form, t0=values))
            np.testing.assert_allclose(response_tensors(response)["t1"], 2 * values + 1, atol=0.05)

    asyncio.run(run())


def test_messages_at_a_cut_that_are_none(served) -> None:
    async def run():
        async with served() as (client, (stage,)):
            plain = request(1)
            plain.parameters["wire_format"].string_param = "fp16"
            cut_off = crossing("fp16", t0=rows(1)["t0"])
            cut_off.raw_input_contents[0] = cut_off.raw_input_contents[0][:-1]
            cut_off.inputs[0].shape[0] -= 1
            for wrong, words in (
                (plain, "has one input, 'crossing', of datatype UINT8 and one dimension; got: t0 float32[1, 2]"),
                (cut_off, "a message ends 1 bytes too early"),
                (crossing("fp16", other=rows(1)["t0"]), "input 'other' is unknown; model m takes: t0"),
                (
                    crossing("int8", t0=np.ones((1, 3), np.float32)),
                    "input 't0' has shape [1, 3]; model m takes [-1, 2]",
                ),
            ):
                assert (
                    await refusal(client().infer(wrong)) == ("INVALID_ARGUMENT", words)
                    or words in (await refusal(client().infer(wrong)))[1]
                )
            call = asyncio.ensure_future(client("b").infer(request(1)))
            await given(stage)
            stage.finish()
            await call

    asyncio.run(run())


def test_a_request_begins_at_the_stage_of_its_model_s_name(served) -> None:
    async def run():
        names = {"m": 0, "m.0": 0, "m.4": 1}
        async with served(num_stages=2, entries=(0, 1), names=names) as (client, (first, second)), working(second):
            later = make_request("m.4", {"t1": rows(3)["t0"]})
            response = await client().infer(later)
            assert response.model_name == "m.4"
            assert response_tensors(response)["t2"].tolist() == [[7, 7]]
            call = asyncio.ensure_future(client().infer(request(1)))
            await given(first)
            first.finish()
            assert response_tensors(await call)["t2"].tolist() == [[7, 7]]
            about = await client().stub.ModelMetadata(pb.ModelMetadataRequest(name="m.4"), metadata=client().metadata)
            assert [one.name for one in about.inputs] == ["t1"]
            wrong = make_request("m.4", rows(1))
            assert (await refusal(client().infer(wrong)))[1] == "input 't0' is unknown; model m takes: t1"

    asyncio.run(run())
