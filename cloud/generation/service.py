"""The Open Inference Protocol's service on the tail of a language model.

Each stream is answered in the order of its requests, and one at a time: a next token needs the one before. A device
that generates several texts has a stream for each. A refused request does not end the stream.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import NoReturn

import grpc
import numpy as np
from google.protobuf.message import DecodeError

from cloud.beside.health import HealthCalls
from cloud.dataplane.callers import Callers, Context
from cloud.generation.tail import LanguageTail
from cloud.stages.work import RequestRefused
from edgefl.errors import ProtocolError
from edgefl.offload.generation.stage_info import StageInfo
from edgefl.protocols.inference import open_inference_grpc_pb2 as pb
from edgefl.protocols.inference.sequences import HIDDEN, TOKEN, parse_sequence_request
from edgefl.protocols.inference.service import REQUEST_DIGEST, REQUEST_TIMEOUT, STREAM_STATUS
from edgefl.protocols.inference.tensors import add_output, encode_raw
from edgefl.terminal.text import one_line

PLATFORM = "edgefl_decoder"
MAX_ID_CHARS = 1024
READ_S = 30.0  # time limit to receive the request of a unary call
WRITE_S = 60.0  # time limit for a client to take a response from a stream
STREAMS_OF_A_DEVICE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedTail:
    """The tail, as clients name it."""

    name: str
    info: StageInfo


class SequenceService(HealthCalls):
    """Implements `GRPCInferenceService` in the event loop."""

    _extensions = ("sequence",)

    def __init__(
        self, served: ServedTail, tail: LanguageTail, callers: Callers, pace: Callable[[str], float] = lambda _: 0.0
    ) -> None:
        super().__init__(callers)
        self._served, self._tail, self._pace = served, tail, pace
        self._streams: Counter[str] = Counter()  # and unary calls

    def _reason(self) -> str:
        return self._tail.reason

    async def ModelMetadata(  # noqa: N802
        self, request: pb.ModelMetadataRequest, context: Context
    ) -> pb.ModelMetadataResponse:
        await self._callers.any(context)
        await self._find(request.name, request.version, context)
        info = self._served.info
        return pb.ModelMetadataResponse(
            name=self._served.name, versions=["1"], platform=PLATFORM,
            inputs=[_described(HIDDEN, "FP32", (1, -1, info.spec.hidden))],
            outputs=[_described(TOKEN, "INT64", (1, -1))],
            properties={REQUEST_DIGEST: info.digest, "context": str(info.spec.context), "blocks": _blocks(info)},
        )  # fmt: skip

    async def ModelInfer(self, requests: AsyncIterator[bytes], context: Context) -> pb.ModelInferResponse:  # noqa: N802
        device = await self._enter(context)
        try:
            async with asyncio.timeout(READ_S):
                data = await anext(requests, b"")
            return await self._answer(device, data, context.time_remaining())
        except _AnswerRefused as refused:
            return await _abort(context, refused.reason)
        except TimeoutError:
            words = f"the request was incomplete after {READ_S:g} s"
            return await _abort(context, RequestRefused("DEADLINE_EXCEEDED", words))
        finally:
            self._leave(device)

    async def ModelStreamInfer(self, requests: AsyncIterator[bytes], context: Context) -> None:  # noqa: N802
        device = await self._enter(context)
        try:
            async for data in requests:
                if (wait_s := self._pace(device)) > 0:
                    await asyncio.sleep(wait_s)
                response = await self._stream_response(device, data)
                async with asyncio.timeout(WRITE_S):
                    await context.write(response)
        except TimeoutError:
            await context.abort(
                grpc.StatusCode.ABORTED, f"a response was not taken within {WRITE_S:g} s; read the responses"
            )
        finally:
            self._leave(device)

    async def _enter(self, context: Context) -> str:
        """Return the caller's name, if it may have one more stream."""
        device = await self._callers.any(context)
        if self._streams[device] >= STREAMS_OF_A_DEVICE:
            await _abort(context, RequestRefused(
                "RESOURCE_EXHAUSTED",
                f"device {device} has {STREAMS_OF_A_DEVICE} streams here already, the most that it may have; end one",
            ))  # fmt: skip
        self._streams[device] += 1
        return device

    def _leave(self, device: str) -> None:
        self._streams[device] -= 1
        if not self._streams[device]:
            del self._streams[device]
            self._tail.orphan(device)

    async def _stream_response(self, device: str, data: bytes) -> pb.ModelStreamInferResponse:
        try:
            return pb.ModelStreamInferResponse(infer_response=await self._answer(device, data, None))
        except _AnswerRefused as refused:
            response = pb.ModelInferResponse(model_name=self._served.name, id=refused.id)
            response.parameters[STREAM_STATUS].string_param = refused.reason.status
            return pb.ModelStreamInferResponse(error_message=str(refused.reason), infer_response=response)

    async def _answer(self, device: str, data: bytes, remaining_s: float | None) -> pb.ModelInferResponse:
        """Return the response to a request; raises _AnswerRefused."""
        number = ""
        try:
            request = pb.ModelInferRequest.FromString(data)
            number = request.id[:MAX_ID_CHARS]
            self._refuse_other(request)
            parsed = parse_sequence_request(request, self._served.info.spec.hidden)
            async with asyncio.timeout(_timeout_s(request, remaining_s)):
                token = await self._tail.submit(device, parsed)
        except DecodeError as cause:
            refused = RequestRefused("INVALID_ARGUMENT", "the message is not a ModelInferRequest")
            raise _AnswerRefused(number, refused) from cause
        except ProtocolError as cause:
            raise _AnswerRefused(number, RequestRefused("INVALID_ARGUMENT", str(cause))) from cause
        except TimeoutError as cause:
            refused = RequestRefused("DEADLINE_EXCEEDED", "the request was not computed within its time limit")
            raise _AnswerRefused(number, refused) from cause
        except RequestRefused as cause:
            raise _AnswerRefused(number, cause) from cause
        response = pb.ModelInferResponse(model_name=self._served.name, model_version="1", id=number)
        tokens = np.array([[] if token is None else [token]], np.int64)
        add_output(response, (TOKEN, "INT64", tokens.shape), encode_raw(tokens))
        return response

    def _refuse_other(self, request: pb.ModelInferRequest) -> None:
        self._refuse_other_model(request.model_name, request.model_version)
        digest = self._served.info.digest
        if REQUEST_DIGEST in request.parameters:
            seen = request.parameters[REQUEST_DIGEST].string_param
            if seen != digest:
                raise RequestRefused(
                    "FAILED_PRECONDITION",
                    f"the request is for the tail with digest {one_line(seen, 80)}; this server has {digest}. Split "
                    "the model once, and use the head and the tail of the same split",
                )

    def _refuse_other_model(self, name: str, version: str) -> None:
        if name != self._served.name:
            raise RequestRefused(
                "NOT_FOUND", f"model {one_line(name, 80)!r} is not on this server; it has: {self._served.name}"
            )
        if version not in {"", "1"}:
            raise RequestRefused("NOT_FOUND", f"model {name!r} has version 1 here, not {one_line(version, 80)!r}")

    async def _find(self, name: str, version: str, context: Context) -> None:
        try:
            self._refuse_other_model(name, version)
        except RequestRefused as refused:
            await _abort(context, refused)


class _AnswerRefused(Exception):
    """A request that gets no token."""

    def __init__(self, number: str, reason: RequestRefused) -> None:
        super().__init__(str(reason))
        self.id, self.reason = number, reason


def _timeout_s(request: pb.ModelInferRequest, remaining_s: float | None) -> float | None:
    """Return the shorter one of the call's deadline and the parameter `timeout` in microseconds (0 = none)."""
    value = 0
    if REQUEST_TIMEOUT in request.parameters:
        value = request.parameters[REQUEST_TIMEOUT].int64_param
        if value < 0:
            raise ProtocolError(f"parameter 'timeout' is {value}; expected microseconds, an integer of 0 or more")
    shortest = min(value / 1e6 or math.inf, math.inf if remaining_s is None else remaining_s)
    return None if math.isinf(shortest) else shortest


def _described(name: str, datatype: str, shape: tuple[int, ...]) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(name=name, datatype=datatype, shape=shape)


def _blocks(info: StageInfo) -> str:
    return f"{info.start}-{info.end} of {info.spec.num_blocks}"


async def _abort(context: Context, refused: RequestRefused) -> NoReturn:
    await context.abort(grpc.StatusCode[refused.status], str(refused))
    raise refused  # not reached: an aborted call raises
