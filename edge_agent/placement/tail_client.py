"""The client of stage servers: one channel, by mutual TLS with the device's certificate, to the first that answers.

Deadlines travel as durations, never as times: a device's clock may be wrong. A server without the property
`wire_formats`, such as Triton, gets plain tensors.
Invariant: whatever a server does ends in a response that fits, or in a `TailFailed` by the deadline.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np

from edgefl.errors import ParentLeft, ProtocolError
from edgefl.offload import wire
from edgefl.protocols.inference import open_inference_grpc_pb2 as pb
from edgefl.protocols.inference.service import (
    REQUEST_DIGEST,
    REQUEST_TIMEOUT,
    SERVER_TIME,
    WIRE_FORMAT,
    WIRE_FORMATS,
    WIRE_INPUT,
    InferenceStub,
)
from edgefl.protocols.inference.tensors import make_request, response_tensors
from edgefl.protocols.ports.client_channel import answered, close_after, open_channel
from edgefl.protocols.tls import Identity
from edgefl.terminal.text import one_line
from edgefl.trees import Array, Tree

DEVICE_METADATA = "edgefl-device"  # the device's name, if there is no certificate
MAX_REASON_CHARS = 300
# The server works, but not for this release: it would refuse the next request, too.
_WRONG = frozenset({"FAILED_PRECONDITION", "NOT_FOUND", "PERMISSION_DENIED", "UNAUTHENTICATED", "UNIMPLEMENTED"})


class TailFailed(Exception):
    """The cloud's part gave no usable answer."""

    def __init__(self, reason: str, *, status: str, at_once: bool = False) -> None:
        super().__init__(reason)
        self.status = status  # name of a gRPC status code
        self.at_once = at_once  # the next request would fail, too
        self.blames_values = status == "INVALID_ARGUMENT"  # this request's values, not the tail


@dataclass(frozen=True, kw_only=True, slots=True)
class TailCall:
    """What is computed behind a cut."""

    model: str  # the tail's name at the server
    digest: str  # of the release's model
    form: str  # wire format
    outputs: Sequence[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class TailAnswer:
    """The outputs, and what they cost."""

    outputs: Tree
    num_bytes: int  # both ways
    total_ms: float
    server_ms: float | None  # as the server says; None if it does not


class TailClient:
    """Used in one event loop."""

    def __init__(self, addresses: Sequence[str], identity: Identity | None, device: str) -> None:
        self._addresses, self._identity = list(addresses), identity
        self._metadata: tuple[tuple[str, str], ...] = () if identity else ((DEVICE_METADATA, device),)
        self._at = 0
        self._channel: grpc.aio.Channel | None = None
        self._certificate = 0.0  # when it was written
        self._forms: dict[str, frozenset[str]] = {}  # by model: the wire formats that the server decodes
        self._calls: set[Any] = set()  # that run on the channel
        self._closing: set[asyncio.Task[None]] = set()
        self._is_closed = False

    @property
    def address(self) -> str:
        """The server in use; empty if none is known."""
        return self._addresses[self._at] if self._addresses else ""

    async def infer(self, call: TailCall, tensors: Tree, timeout_s: float) -> TailAnswer:
        """Compute the outputs of tensors that cross; raises TailFailed, or ProtocolError for NaN among them."""
        stub, begun_s = self._stub(), time.perf_counter()
        try:
            async with asyncio.timeout(timeout_s):
                if call.model not in self._forms:
                    await self._ask(stub, call, timeout_s)
                request = self._request(call, tensors)
                left_s = timeout_s - (time.perf_counter() - begun_s)
                request.parameters[REQUEST_TIMEOUT].int64_param = max(1, int(left_s * 1e6))
                sent_s = time.perf_counter()
                response = await self._answered(stub.ModelInfer(request, timeout=left_s, metadata=self._metadata))
        except TimeoutError as cause:
            raise TailFailed(f"no answer within {timeout_s * 1e3:.0f} ms", status="DEADLINE_EXCEEDED") from cause
        except grpc.aio.AioRpcError as cause:
            raise _failed(cause) from cause
        total_ms = 1e3 * (time.perf_counter() - sent_s)
        outputs = _fitting(response, call)
        server = response.parameters.get(SERVER_TIME)
        return TailAnswer(
            outputs=outputs, num_bytes=_size(request.raw_input_contents) + _size(response.raw_output_contents),
            total_ms=total_ms, server_ms=None if server is None else server.int64_param / 1e3,
        )  # fmt: skip

    async def ping_ms(self, timeout_s: float) -> float:
        """Return the time of an empty call on an open connection; raises TailFailed."""
        stub, took_ms = self._stub(), 0.0
        try:
            for _ in range(2):  # the first one may open the connection
                begun_s = time.perf_counter()
                await self._answered(
                    stub.ServerLive(pb.ServerLiveRequest(), timeout=timeout_s, metadata=self._metadata)
                )
                took_ms = 1e3 * (time.perf_counter() - begun_s)
        except grpc.aio.AioRpcError as cause:
            raise _failed(cause) from cause
        return took_ms

    def renew(self, *, elsewhere: bool = False) -> None:
        """Connect anew if the certificate was renewed, or to the next server of the list."""
        if elsewhere:
            self._at = (self._at + 1) % max(1, len(self._addresses))
        if elsewhere or self._certificate != self._written_s():
            self._drop()

    async def close(self) -> None:
        """Close the connection after the calls that run on it; no call is begun any more."""
        self._is_closed = True
        self._drop()
        await asyncio.gather(*self._closing, return_exceptions=True)

    def _drop(self) -> None:
        """Have the next call open a connection; those that run end on the former one."""
        channel, self._channel = self._channel, None
        calls, self._calls = self._calls, set()
        self._forms.clear()
        if channel is not None:
            task = asyncio.get_running_loop().create_task(close_after(channel, calls), name="close-tail")
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _answered(self, call: Any) -> Any:
        """Await a call; raises TailFailed if its connection was closed. A task that is cancelled stays so."""
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        try:
            return await answered(call)
        except ParentLeft as cause:
            raise TailFailed("the connection to the stage server was closed", status="UNAVAILABLE") from cause

    def _written_s(self) -> float:
        return self._identity.cert.stat().st_mtime if self._identity else 0.0

    def _stub(self) -> InferenceStub:
        if self._is_closed:
            raise TailFailed("the model was replaced by another version", status="CANCELLED")
        if not self._addresses:
            raise TailFailed(
                "no stage server is known: the release names none, and this agent was started without --stages",
                status="UNAVAILABLE", at_once=True,
            )  # fmt: skip
        if self._channel is None:
            self._certificate = self._written_s()
            self._channel = open_channel(self.address, self._identity)
        return InferenceStub(self._channel)

    async def _ask(self, stub: InferenceStub, call: TailCall, timeout_s: float) -> None:
        request = pb.ModelMetadataRequest(name=call.model)
        about = await self._answered(stub.ModelMetadata(request, timeout=timeout_s, metadata=self._metadata))
        seen = about.properties.get(REQUEST_DIGEST, "")
        if seen and seen != call.digest:
            raise TailFailed(
                f"the stage server has another release: {seen[:16]}..., here is {call.digest[:16]}...",
                status="FAILED_PRECONDITION", at_once=True,
            )  # fmt: skip
        self._forms[call.model] = frozenset(one for one in about.properties.get(WIRE_FORMATS, "").split(",") if one)

    def _request(self, call: TailCall, tensors: Tree) -> pb.ModelInferRequest:
        given: Mapping[str, Array] = tensors
        form = call.form if call.form in self._forms[call.model] else ""
        if form:
            try:
                message = wire.encode(tensors, form)
            except ProtocolError:  # a value beyond the format's range; NaN is refused in every format
                form = wire.FORMATS[0]
                message = wire.encode(tensors, form)
            given = {WIRE_INPUT: np.frombuffer(message, np.uint8)}
        request = make_request(call.model, given)
        if form:
            request.parameters[WIRE_FORMAT].string_param = form
        request.parameters[REQUEST_DIGEST].string_param = call.digest
        for name in call.outputs:
            request.outputs.add(name=name)
        return request


def _fitting(response: pb.ModelInferResponse, call: TailCall) -> Tree:
    try:
        outputs = response_tensors(response)
    except ProtocolError as cause:
        raise TailFailed(f"the stage server's response cannot be read: {cause}", status="INTERNAL") from cause
    if missing := [name for name in call.outputs if name not in outputs]:
        raise TailFailed(f"the stage server's response has no output {missing[0]!r}", status="INTERNAL", at_once=True)
    return outputs


def _failed(error: grpc.aio.AioRpcError) -> TailFailed:
    status = error.code().name
    reason = one_line(error.details() or "the call ended", MAX_REASON_CHARS)
    return TailFailed(f"{status}: {reason}", status=status, at_once=status in _WRONG)


def _size(contents: Any) -> int:
    return sum(map(len, contents))
