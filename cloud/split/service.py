"""The gRPC service of training in parts: one stream of bytes each way for a device's round.

A device is who its certificate says; its stream is its session, so there is no session id that another could name. A
frame is read when the training process has a place for it: until then it waits in the device, or in the flow control's
window. A stream ends when the device's round is over, or its time, as a duration, or when it says nothing for too long.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc

from cloud.dataplane.callers import Callers, Context
from cloud.split.process import JobProcess, ServerSession, SessionEnded
from cloud.split.records import SessionSpec
from edgefl.errors import ProtocolError
from edgefl.protocols.split.messages import METHOD, SERVICE, BeginTraining, FrameReader, parse_frame

CHUNK_BYTES = 256 << 10
Admit = Callable[[str, BeginTraining], Awaitable[tuple[SessionSpec, JobProcess]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitLimits:
    """How much a device, and all, may use."""

    max_message_bytes: int = 64 << 20
    idle_s: float = 120.0  # without a byte from a device for which nothing is computed
    session_s: float = 86_400.0
    streams: int = 256
    device_streams: int = 2  # the old one of a broken connection may not have ended yet
    write_s: float = 60.0  # for a device to take what is sent


class SplitService:
    """Implements the service in the event loop."""

    def __init__(
        self, callers: Callers, admit: Admit, limits: SplitLimits, pace: Callable[[str], float] = lambda _: 0.0
    ) -> None:
        self._callers, self._admit, self._limits, self._pace = callers, admit, limits, pace
        self._streams: Counter[str] = Counter()

    async def train(self, requests: AsyncIterator[bytes], context: Context) -> None:
        """Serve one stream to its end."""
        device = await self._callers.device(context)
        try:
            self._refuse_too_many(device)
            self._streams[device] += 1
            try:
                await self._serve(device, requests, context)
            finally:
                self._streams[device] -= 1
                if not self._streams[device]:
                    del self._streams[device]
        except SessionEnded as ended:
            await _abort(context, ended.status, str(ended))
        except ProtocolError as error:
            await _abort(context, "INVALID_ARGUMENT", str(error))
        except TimeoutError as late:
            await _abort(context, "DEADLINE_EXCEEDED", str(late) or "the device's time in this round is over")

    def _refuse_too_many(self, device: str) -> None:
        limits = self._limits
        if self._streams[device] >= limits.device_streams or self._streams.total() >= limits.streams:
            raise SessionEnded(
                "RESOURCE_EXHAUSTED",
                f"device {device} has {self._streams[device]} of {limits.device_streams} streams here, and all devices "
                f"{self._streams.total()} of {limits.streams}; end one first",
            )

    async def _serve(self, device: str, requests: AsyncIterator[bytes], context: Context) -> None:
        here: list[ServerSession] = []
        frames = self._frames(device, requests, lambda: any(one.in_process for one in here))
        first = await anext(frames, None)
        if first is None:
            return
        begin = parse_frame(first[0]).message
        if not isinstance(begin, BeginTraining):
            raise ProtocolError(f"a stream begins with {begin.kind!r}; expected 'begin'")
        spec, process = await self._admit(device, begin)
        session = await process.open(spec)
        here.append(session)
        try:
            async with asyncio.timeout(min(begin.remaining_s, self._limits.session_s)):
                await self._exchange(session, first, frames, context)
        finally:
            process.leave(session)

    async def _exchange(
        self, session: ServerSession, first: list[bytes], frames: AsyncIterator[list[bytes]], context: Context
    ) -> None:  # fmt: skip
        """Pass frames on in both directions until one of them ends."""
        reading = asyncio.create_task(self._read(session, first, frames), name="split-read")
        writing = asyncio.create_task(self._write(session, context), name="split-write")
        try:
            done, _ = await asyncio.wait((reading, writing), return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in (reading, writing):
                task.cancel()
            await asyncio.gather(reading, writing, return_exceptions=True)

    @staticmethod
    async def _read(session: ServerSession, first: list[bytes], frames: AsyncIterator[list[bytes]]) -> None:
        for body in first:
            await session.send(body)
        async for some in frames:
            for body in some:
                await session.send(body)

    async def _write(self, session: ServerSession, context: Context) -> None:
        while True:
            frame = memoryview(await session.answer())
            async with asyncio.timeout(self._limits.write_s):
                for start in range(0, len(frame), CHUNK_BYTES):
                    await context.write(bytes(frame[start : start + CHUNK_BYTES]))

    async def _frames(
        self, device: str, requests: AsyncIterator[bytes], is_busy: Callable[[], bool]
    ) -> AsyncIterator[list[bytes]]:  # fmt: skip
        """Yield the complete frames as they come; raises TimeoutError if the device says nothing and is not waiting."""
        reader, stream = FrameReader(self._limits.max_message_bytes), aiter(requests)
        reading: asyncio.Future[bytes | None] | None = None
        try:
            while True:
                reading = asyncio.ensure_future(anext(stream, None))
                while not (await asyncio.wait((reading,), timeout=self._limits.idle_s))[0]:
                    if not is_busy():
                        raise TimeoutError(f"nothing came from device {device} for {self._limits.idle_s:g} s")
                if (data := reading.result()) is None:
                    return
                if (wait_s := self._pace(device)) > 0:
                    await asyncio.sleep(wait_s)
                if found := list(reader.feed(data)):
                    yield found
        finally:
            if reading is not None:
                reading.cancel()


def split_handler(service: SplitService, wrap: Any = lambda method: method) -> Any:
    """Return the `grpc.GenericRpcHandler`; `wrap` is applied to the method."""
    return grpc.method_handlers_generic_handler(
        SERVICE, {METHOD: grpc.stream_stream_rpc_method_handler(wrap(service.train), None, None)}
    )


async def _abort(context: Context, status: str, reason: str) -> NoReturn:
    await context.abort(getattr(grpc.StatusCode, status, grpc.StatusCode.UNKNOWN), reason)
    raise RuntimeError(reason)  # not reached: an aborted call raises
