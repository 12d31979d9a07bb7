"""Bytes between the trainer's socket and a real gRPC stream, and how its end reaches the trainer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from edge_agent.link.profile import Profile
from edge_agent.training.split.link import LinkLost, SocketLink
from edge_agent.training.split.tunnel import SplitTunnel
from edgefl.errors import TaskError
from edgefl.local_fleet import free_ports
from edgefl.protocols.split.messages import METHOD, SERVICE, FinishTraining, TrainingFinished, pack


async def served(port: int, train: Any) -> grpc.aio.Server:
    server = grpc.aio.server()
    handlers = {METHOD: grpc.stream_stream_rpc_method_handler(train, None, None)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    return server


@pytest.fixture
def profile() -> Profile:
    return Profile(device="cam-1", cloud_url="http://127.0.0.1:1", grpc="127.0.0.1:1", broker="mqtt://127.0.0.1:1")


def test_bytes_go_both_ways_and_a_refusal_arrives(tmp_path: Path, profile: Profile) -> None:
    async def train(requests: AsyncIterator[bytes], context: Any) -> None:
        assert dict(context.invocation_metadata())["edgefl-device"] == "cam-1"
        seen = b"".join([await anext(aiter(requests)) for _ in range(1)])
        assert seen == pack(FinishTraining())
        await context.write(pack(TrainingFinished())[:7])
        await context.write(pack(TrainingFinished())[7:])
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many")

    def device(path: Path) -> None:
        link = SocketLink(path, 20.0)
        link.send(FinishTraining())
        assert link.receive().message == TrainingFinished()
        with pytest.raises(TaskError, match=r"RESOURCE_EXHAUSTED.: too many"):
            link.receive()
        link.close()

    async def run() -> None:
        [port] = free_ports(1)
        server = await served(port, train)
        async with SplitTunnel(profile, tmp_path).listening(f"127.0.0.1:{port}") as path:
            await asyncio.to_thread(device, path)
        assert not path.exists()
        await server.stop(None)

    asyncio.run(run())


def test_a_server_that_is_not_there_is_a_lost_link(tmp_path: Path, profile: Profile) -> None:
    def device(path: Path) -> None:
        link = SocketLink(path, 20.0)
        with pytest.raises(LinkLost, match="UNAVAILABLE"):
            link.receive()
        link.close()

    async def run() -> None:
        [port] = free_ports(1)
        async with SplitTunnel(profile, tmp_path).listening(f"127.0.0.1:{port}") as path:
            await asyncio.to_thread(device, path)

    asyncio.run(run())
