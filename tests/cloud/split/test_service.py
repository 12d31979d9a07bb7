"""The service over a real gRPC port: limits, a stream that says nothing, and ends with their status."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from grpc.aio import EOF

from cloud.split.process import ServerSession, SessionEnded
from cloud.split.records import SessionSpec
from cloud.split.service import SplitLimits, SplitService, split_handler
from edgefl.local_fleet import free_ports
from edgefl.protocols.split.messages import (
    METHOD,
    SERVICE,
    BeginTraining,
    Begun,
    FinishTraining,
    TrainingFinished,
    pack,
)
from tests.cloud.split.bench import settings

BEGIN = BeginTraining(version=1, job="job-1", round=1, bundle="", samples=1, steps=1, inputs="")


class ScriptedProcess:
    """Answers each frame at once, unless it is told to be silent."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.left = 0
        self.is_silent = False
        self.sessions: list[ServerSession] = []

    async def open(self, spec: SessionSpec) -> ServerSession:
        self.sessions.append(ServerSession(len(self.sessions), spec, self))  # type: ignore[arg-type]
        return self.sessions[-1]

    async def send_frame(self, session: ServerSession, body: bytes) -> None:
        self.frames.append(body)
        if not self.is_silent:
            session.deliver(pack(Begun(step=0, window=4) if len(self.frames) == 1 else TrainingFinished()))
            session.taken()

    def leave(self, _session: ServerSession) -> None:
        self.left += 1


class OneDevice:
    """Every caller is cam-1."""

    async def device(self, _context: Any) -> str:
        return "cam-1"


def on_port(test: Callable[[Any, ScriptedProcess], Any], admits: SessionEnded | None = None, **limits: Any) -> None:
    async def run() -> None:
        process = ScriptedProcess()

        async def admit(device: str, begin: BeginTraining) -> tuple[SessionSpec, Any]:
            if admits is not None:
                raise admits
            return SessionSpec(device=device, round=begin.round, tensors="", train=settings()), process

        service = SplitService(OneDevice(), admit, SplitLimits(**limits))  # type: ignore[arg-type]
        server, [port] = grpc.aio.server(), free_ports(1)
        server.add_generic_rpc_handlers((split_handler(service),))
        server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            await test(channel.stream_stream(f"/{SERVICE}/{METHOD}", None, None), process)
        await server.stop(None)

    asyncio.run(run())


async def status_of(call: Any) -> tuple[grpc.StatusCode, str]:
    """Return how a stream ended; a client gets it behind all that was sent."""
    with contextlib.suppress(grpc.aio.AioRpcError):
        while await call.read() is not EOF:
            pass
    return await call.code(), await call.details()


def test_frames_are_passed_on_in_any_pieces() -> None:
    async def test(method: Any, process: ScriptedProcess) -> None:
        call, data = method(), pack(BEGIN) + pack(FinishTraining())
        for start in range(0, len(data), 11):
            await call.write(data[start : start + 11])
        seen = b""
        while len(seen) < len(pack(Begun(step=0, window=4)) + pack(TrainingFinished())):
            seen += await call.read()
        await call.done_writing()
        assert seen == pack(Begun(step=0, window=4)) + pack(TrainingFinished())
        assert (await status_of(call))[0] is grpc.StatusCode.OK
        assert len(process.frames) == 2
        assert process.left == 1

    on_port(test)


@pytest.mark.parametrize(
    ("data", "limits", "code", "reason"),
    [
        (
            pack(FinishTraining()),
            {},
            grpc.StatusCode.INVALID_ARGUMENT,
            "a stream begins with 'finish'; expected 'begin'",
        ),
        (b"\x00\x00\x00\x7f", {}, grpc.StatusCode.INVALID_ARGUMENT, "a message of 2130706432 bytes"),
        (b"", {"idle_s": 0.05}, grpc.StatusCode.DEADLINE_EXCEEDED, "nothing came from device cam-1 for 0.05 s"),
        (
            pack(BEGIN),
            {"session_s": 0.05},
            grpc.StatusCode.DEADLINE_EXCEEDED,
            "the device's time in this round is over",
        ),
        (b"", {"device_streams": 0}, grpc.StatusCode.RESOURCE_EXHAUSTED, "device cam-1 has 0 of 0 streams here"),
    ],
)
def test_a_hostile_stream_ends_with_the_reason(data: bytes, limits: Any, code: grpc.StatusCode, reason: str) -> None:
    async def test(method: Any, _process: ScriptedProcess) -> None:
        call = method()
        with contextlib.suppress(grpc.aio.AioRpcError):  # its refusal may be here already; it is checked below
            await call.write(data or b"\x01")
        seen, said = await status_of(call)
        assert seen is code
        assert reason in said

    on_port(test, **limits)


def test_what_is_not_admitted_is_told_why() -> None:
    async def test(method: Any, _process: ScriptedProcess) -> None:
        call = method()
        await call.write(pack(BEGIN))
        assert await status_of(call) == (grpc.StatusCode.PERMISSION_DENIED, "not asked")

    on_port(test, admits=SessionEnded("PERMISSION_DENIED", "not asked"))


def test_a_device_that_waits_for_an_answer_is_not_idle() -> None:
    async def test(method: Any, process: ScriptedProcess) -> None:
        process.is_silent = True
        call = method()
        await call.write(pack(BEGIN))
        await asyncio.sleep(0.3)  # six times as long as it may be idle
        process.sessions[0].end("FAILED_PRECONDITION", "now")
        assert await status_of(call) == (grpc.StatusCode.FAILED_PRECONDITION, "now")

    on_port(test, idle_s=0.05)


def test_an_endless_stream_waits_for_places() -> None:
    async def test(method: Any, process: ScriptedProcess) -> None:
        process.is_silent = True
        call = method()
        await call.write(pack(BEGIN))
        for _ in range(50):
            await call.write(pack(FinishTraining()))
        await asyncio.sleep(0.2)
        assert len(process.frames) <= 6  # the others wait in the device, or in the window of flow control
        call.cancel()

    on_port(test)
