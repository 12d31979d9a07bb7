"""The Open Inference Protocol's service on the stages of one model.

A request is read when its device has a place for it: until then it waits in the device, or in the flow control's
window. On a stream, responses come in the order of the requests, and a refused request does not end the stream.
Deadlines are durations: the call's own, and the parameter `timeout` of a request in microseconds; the shorter counts.
With the parameter `wire_format`, a request's only input is a message of `edgefl.offload.wire` with its tensors.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
import numpy as np
from google.protobuf.message import DecodeError

from cloud.beside.health import HealthCalls
from cloud.dataplane.callers import Callers, Context
from cloud.stages.pipeline import Pipeline
from cloud.stages.work import Output, RequestRefused, StageRequest
from edgefl.errors import ProtocolError
from edgefl.models.tensors import TensorInfo
from edgefl.offload.wire import FORMATS, decode
from edgefl.protocols.inference import open_inference_grpc_pb2 as pb
from edgefl.protocols.inference.service import (
    REQUEST_DIGEST,
    REQUEST_TIMEOUT,
    SERVER_TIME,
    STREAM_STATUS,
    WIRE_FORMAT,
    WIRE_FORMATS,
    WIRE_INPUT,
)
from edgefl.protocols.inference.tensors import add_output, check_fits, refuse_nan, request_tensors
from edgefl.terminal.text import one_line
from edgefl.trees import Array

PLATFORM = "onnxruntime_onnx"
MAX_ID_CHARS = 1024
READ_S = 30.0  # time limit to receive the request of a unary call
WRITE_S = 60.0  # time limit for a client to take a response from a stream
CALLS_OF_A_DEVICE = 32  # unary calls whose requests are received or computed
STREAMS_OF_A_DEVICE = 8
SMALL_BYTES = 64 << 10  # of a message that is decoded in the event loop
STREAM_DEPTH = 32  # requests of one stream that are computed or wait to be sent back


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """The model of the stages, as clients name it."""

    name: str
    version: str
    digest: str  # SHA-256 of its file in hex
    entries: Mapping[str, int]  # by the names of the model and its tails: the stage at which such requests begin
    refuses_nan: bool = True


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request on a stream, and what becomes of it."""

    id: str
    model: str  # as the client names it
    outputs: list[str]
    request: StageRequest | RequestRefused
    arrived_s: float = 0.0  # on the event loop's clock


class StageService(HealthCalls):
    """Implements `GRPCInferenceService` in the event loop."""

    def __init__(
        self, model: ServedModel, pipeline: Pipeline, callers: Callers, pace: Callable[[str], float] = lambda _: 0.0
    ) -> None:
        super().__init__(callers)
        self._model, self._pipeline, self._pace = model, pipeline, pace
        self._calls: Counter[str] = Counter()
        self._streams: Counter[str] = Counter()

    def _reason(self) -> str:
        return self._pipeline.reason

    async def ModelMetadata(  # noqa: N802
        self, request: pb.ModelMetadataRequest, context: Context
    ) -> pb.ModelMetadataResponse:
        await self._callers.any(context)
        entry = await self._find(request.name, request.version, context)
        return pb.ModelMetadataResponse(
            name=request.name, versions=[self._model.version], platform=PLATFORM,
            inputs=[_described(one) for one in self._pipeline.inputs[entry]],
            outputs=[_described(one) for one in self._pipeline.outputs[entry]],
            properties={REQUEST_DIGEST: self._model.digest, WIRE_FORMATS: ",".join(FORMATS)},
        )  # fmt: skip

    async def ModelInfer(self, requests: AsyncIterator[bytes], context: Context) -> pb.ModelInferResponse:  # noqa: N802
        device = await self._callers.any(context)
        if self._calls[device] >= CALLS_OF_A_DEVICE:
            await _abort(context, RequestRefused(
                "RESOURCE_EXHAUSTED",
                f"device {device} has {CALLS_OF_A_DEVICE} calls here already, the most that it may have; wait for one",
            ))  # fmt: skip
        self._calls[device] += 1
        try:
            async with asyncio.timeout(READ_S):
                data = await anext(requests, b"")
            asked = await self._ask(device, data, context.time_remaining())
            if isinstance(asked.request, RequestRefused):
                await _abort(context, asked.request)
            return self._response(asked, await asked.request.settled)
        except RequestRefused as refused:
            return await _abort(context, refused)
        except TimeoutError:
            words = f"the request was incomplete after {READ_S:g} s"
            return await _abort(context, RequestRefused("DEADLINE_EXCEEDED", words))
        finally:
            _less(self._calls, device)

    async def ModelStreamInfer(self, requests: AsyncIterator[bytes], context: Context) -> None:  # noqa: N802
        device = await self._callers.any(context)
        if self._streams[device] >= STREAMS_OF_A_DEVICE:
            await _abort(context, RequestRefused(
                "RESOURCE_EXHAUSTED",
                f"device {device} has {STREAMS_OF_A_DEVICE} streams here already, the most that it may have; use those",
            ))  # fmt: skip
        self._streams[device] += 1
        asked: asyncio.Queue[_Asked | None] = asyncio.Queue()
        places = asyncio.Semaphore(STREAM_DEPTH)
        reading = asyncio.create_task(self._read_stream(device, requests, asked, places), name=f"stream-{device}")
        reading.add_done_callback(lambda _: asked.put_nowait(None))
        try:
            while (one := await asked.get()) is not None:
                response = await self._stream_response(one)
                async with asyncio.timeout(WRITE_S):
                    await context.write(response)
                places.release()
            await reading  # its error, if it has one
        except TimeoutError:
            await context.abort(
                grpc.StatusCode.ABORTED, f"a response was not taken within {WRITE_S:g} s; read the responses"
            )
        finally:
            reading.cancel()
            while not asked.empty():
                left = asked.get_nowait()
                if left is not None and isinstance(left.request, StageRequest):
                    left.request.settled.cancel()
            _less(self._streams, device)

    async def _read_stream(
        self, device: str, requests: AsyncIterator[bytes], asked: asyncio.Queue[_Asked | None],
        places: asyncio.Semaphore,
    ) -> None:  # fmt: skip
        async for data in requests:
            if (wait_s := self._pace(device)) > 0:
                await asyncio.sleep(wait_s)
            asked.put_nowait(await self._ask(device, data, None))
            await places.acquire()  # before the next one is read

    async def _stream_response(self, asked: _Asked) -> pb.ModelStreamInferResponse:
        try:
            if isinstance(asked.request, RequestRefused):
                raise asked.request
            return pb.ModelStreamInferResponse(infer_response=self._response(asked, await asked.request.settled))
        except RequestRefused as refused:
            response = pb.ModelInferResponse(model_name=asked.model, id=asked.id)
            response.parameters[STREAM_STATUS].string_param = refused.status
            return pb.ModelStreamInferResponse(error_message=str(refused), infer_response=response)

    async def _ask(self, device: str, data: bytes, remaining_s: float | None) -> _Asked:
        """Check a request and queue it."""
        number, name, arrived_s = "", "", asyncio.get_running_loop().time()
        try:
            request = pb.ModelInferRequest.FromString(data)
            number, name = request.id[:MAX_ID_CHARS], request.model_name
            entry = self._entry(name, request.model_version)
            timeout_s = min(_timeout_s(request.parameters), math.inf if remaining_s is None else remaining_s)
            self._refuse_parameters(request.parameters)
            outputs = self._outputs(request, entry)
            tensors = request_tensors(request)
            if WIRE_FORMAT in request.parameters:
                tensors = await _decoded(tensors)
            self._check(tensors, entry)
            return _Asked(number, name, outputs, self._pipeline.submit(device, tensors, timeout_s, entry), arrived_s)
        except DecodeError:
            return _Asked(
                number, name, [], RequestRefused("INVALID_ARGUMENT", "the message is not a ModelInferRequest")
            )
        except ProtocolError as error:
            return _Asked(number, name, [], RequestRefused("INVALID_ARGUMENT", str(error)))
        except RequestRefused as refused:
            return _Asked(number, name, [], refused)

    def _check(self, tensors: Mapping[str, Array], entry: int) -> None:
        check_fits(f"model {self._model.name}", self._pipeline.inputs[entry], tensors)
        if not self._pipeline.unmerged and len({array.shape[0] for array in tensors.values()}) > 1:
            rows = ", ".join(f"{name} {array.shape[0]}" for name, array in tensors.items())
            raise ProtocolError(f"the inputs have different numbers of rows ({rows}); expected the same")
        if self._model.refuses_nan:
            refuse_nan(tensors)

    def _refuse_parameters(self, parameters: Mapping[str, Any]) -> None:
        """Refuse what would give another result than the client expects."""
        if REQUEST_DIGEST in parameters and (seen := parameters[REQUEST_DIGEST].string_param) != self._model.digest:
            raise RequestRefused(
                "FAILED_PRECONDITION",
                f"the request is for the release with digest {one_line(seen, 80)}; this server has "
                f"{self._model.digest} ({self._model.name} version {self._model.version}). Update the device or the "
                "server",
            )
        if "sequence_id" in parameters and _value(parameters["sequence_id"]):
            raise ProtocolError(
                "the request belongs to a sequence; this model keeps no state between requests: send no sequence_id"
            )

    def _outputs(self, request: pb.ModelInferRequest, entry: int) -> list[str]:
        known = [one.name for one in self._pipeline.outputs[entry]]
        names = [one.name for one in request.outputs] or known
        for one in request.outputs:
            if one.name not in known:
                raise ProtocolError(
                    f"output {one_line(one.name, 80)!r} is unknown; model {self._model.name} has: {', '.join(known)}"
                )
            if unsupported := sorted({"classification", "shared_memory_region"} & set(one.parameters)):
                raise ProtocolError(f"output {one.name!r} asks for {unsupported[0]}, which this server does not have")
        if len(set(names)) < len(names):
            raise ProtocolError("an output is requested twice")
        return names

    def _response(self, asked: _Asked, outputs: list[Output]) -> pb.ModelInferResponse:
        response = pb.ModelInferResponse(model_name=asked.model, model_version=self._model.version, id=asked.id)
        response.parameters[SERVER_TIME].int64_param = int(1e6 * (asyncio.get_running_loop().time() - asked.arrived_s))
        by_name = {one[0]: one for one in outputs}
        for name in asked.outputs:
            _, datatype, shape, raw = by_name[name]
            add_output(response, (name, datatype, shape), raw)
        return response

    def _entry(self, name: str, version: str) -> int:
        """Return the stage at which requests for a model of this name begin; raises RequestRefused."""
        model = self._model
        if name not in model.entries:
            known = ", ".join(model.entries)
            raise RequestRefused("NOT_FOUND", f"model {one_line(name, 80)!r} is not on this server; it has: {known}")
        if version not in {"", model.version}:
            raise RequestRefused(
                "NOT_FOUND", f"model {name!r} has version {model.version} here, not {one_line(version, 80)!r}"
            )
        return model.entries[name]

    async def _find(self, name: str, version: str, context: Context) -> int:
        try:
            return self._entry(name, version)
        except RequestRefused as refused:
            return await _abort(context, refused)


async def _decoded(tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Return the tensors in a message at a cut; a large one is decoded outside the event loop. Raises ProtocolError."""
    message = tensors.get(WIRE_INPUT)
    if message is None or len(tensors) > 1 or message.dtype != np.uint8 or message.ndim != 1:
        raise ProtocolError(
            f"a request with the parameter {WIRE_FORMAT!r} has one input, {WIRE_INPUT!r}, of datatype UINT8 and one "
            f"dimension; got: {', '.join(f'{name} {one.dtype}{list(one.shape)}' for name, one in tensors.items())}"
        )
    if message.nbytes <= SMALL_BYTES:
        return decode(message.data)
    return await asyncio.to_thread(decode, message.data)


def _timeout_s(parameters: Mapping[str, Any]) -> float:
    """Return the parameter `timeout` in seconds; infinity without one, or for 0, as in Triton."""
    if REQUEST_TIMEOUT not in parameters:
        return math.inf
    value = _value(parameters[REQUEST_TIMEOUT])
    if type(value) is not int or value < 0:
        raise ProtocolError(f"parameter 'timeout' is {value!r}; expected microseconds, an integer of 0 or more")
    return value / 1e6 or math.inf


def _value(parameter: pb.InferParameter) -> Any:
    choice = parameter.WhichOneof("parameter_choice")
    return None if choice is None else getattr(parameter, choice)


def _described(info: TensorInfo) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(name=info.name, datatype=info.datatype, shape=info.shape)


def _less(counts: Counter[str], device: str) -> None:
    counts[device] -= 1
    if not counts[device]:
        del counts[device]


async def _abort(context: Context, refused: RequestRefused) -> NoReturn:
    await context.abort(grpc.StatusCode[refused.status], str(refused))
    raise refused  # not reached: an aborted call raises
