"""The way to a tail: one stream for each text, by the Open Inference Protocol with the device's certificate."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from edge_agent.link.channel import DEVICE_METADATA
from edgefl.errors import ProtocolError
from edgefl.protocols import tls
from edgefl.protocols.inference import open_inference_grpc_pb2 as pb
from edgefl.protocols.inference.sequences import TOKEN, SequenceRequest, make_sequence_request
from edgefl.protocols.inference.service import STREAM_STATUS, InferenceStub
from edgefl.protocols.inference.tensors import response_tensors
from edgefl.protocols.ports.client_channel import open_channel

_END: Any = getattr(grpc.aio, "EOF")  # grpc-stubs lacks it  # noqa: B009
END_S = 5.0  # to tell the tail that a sequence is over


class TailLost(Exception):
    """The connection to the tail is lost; the sequence may still be there."""


class TailRefused(Exception):
    """The tail answered with a refusal: the name of a gRPC status code, and the reason."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True, kw_only=True, slots=True)
class TailAddress:
    """Where the tail is, and who asks."""

    target: str  # host:port
    model: str
    digest: str  # of the tail that belongs to this head
    home: Path | None = None  # with the device's certificate; None = no TLS
    device: str = ""  # without TLS: this device's name


class TailLink:
    """The channel to one tail; it is opened again with a renewed certificate."""

    def __init__(self, address: TailAddress) -> None:
        self.address = address
        self._metadata: Sequence[tuple[str, str]] = () if address.home else ((DEVICE_METADATA, address.device),)
        self._channel: grpc.aio.Channel | None = None
        self._stamp: object = None
        self._closing: set[asyncio.Task[None]] = set()

    def open(self) -> TailStream:
        """Return a new stream; it connects with its first request."""
        home = self.address.home
        identity = None if home is None else tls.Identity.in_folder(home)
        stamp = None if identity is None else identity.cert.stat().st_mtime_ns
        if self._channel is None or stamp != self._stamp:
            self._retire()
            self._channel, self._stamp = open_channel(self.address.target, identity), stamp
        stub = InferenceStub(self._channel)
        return TailStream(stub.ModelStreamInfer(metadata=self._metadata), self.address)

    async def close(self) -> None:
        """Close the channel; streams end."""
        self._retire(grace_s=0.0)
        if self._closing:
            await asyncio.wait(self._closing)

    def _retire(self, grace_s: float = 600.0) -> None:
        """Close the present channel when its streams are over."""
        if self._channel is not None:
            task = asyncio.create_task(self._channel.close(grace_s), name="former-tail-channel")
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
            self._channel = None


class TailStream:
    """One sequence's requests, one after the other."""

    def __init__(self, call: Any, address: TailAddress) -> None:
        self._call, self._address = call, address

    async def send(self, request: SequenceRequest, within_s: float) -> int | None:
        """Return the next token, or None if none is wanted; raises TailLost or TailRefused."""
        message = make_sequence_request(self._address.model, self._address.digest, request)
        try:
            async with asyncio.timeout(within_s):
                await self._call.write(message)
                response = await self._call.read()
            if response is _END:
                raise _error_of(await self._call.code(), await self._call.details())
        except TimeoutError as cause:
            self._call.cancel()
            raise TailLost(f"the tail at {self._address.target} did not answer within {within_s:g} s") from cause
        except asyncio.InvalidStateError as cause:  # gRPC: the call is done already
            raise _error_of(await self._call.code(), await self._call.details()) from cause
        except grpc.aio.AioRpcError as cause:
            raise _error_of(cause.code(), cause.details()) from cause
        return _token_of(response)

    def cancel(self) -> None:
        """End the stream at once."""
        self._call.cancel()

    async def end(self, request: SequenceRequest) -> None:
        """Tell the tail that the sequence is over, if it can be reached, and end the stream."""
        with suppress(TailLost, TailRefused):
            await self.send(request, END_S)
        self._call.cancel()


def _token_of(response: pb.ModelStreamInferResponse) -> int | None:
    if response.error_message:
        status = response.infer_response.parameters[STREAM_STATUS].string_param or "INTERNAL"
        raise TailRefused(status, response.error_message)
    try:
        tokens = response_tensors(response.infer_response).get(TOKEN)
    except ProtocolError as cause:
        raise TailRefused("INTERNAL", f"the tail's response cannot be read: {cause}") from cause
    if tokens is None or tokens.size > 1:
        raise TailRefused("INTERNAL", "the tail's response has no token")
    return int(tokens.reshape(-1)[0]) if tokens.size else None


def _error_of(code: Any, details: str | None) -> Exception:
    """Return what the end of a stream means."""
    name = getattr(code, "name", "UNKNOWN")
    if name in {"UNAVAILABLE", "OK", "CANCELLED", "ABORTED", "INTERNAL", "UNKNOWN", "DEADLINE_EXCEEDED"}:
        return TailLost(f"the connection to the tail ended: {details or name}")
    return TailRefused(name, details or name)
