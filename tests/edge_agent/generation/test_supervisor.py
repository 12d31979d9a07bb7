"""The agent's side: options, a process that is started again, and requests that wait for it."""

from __future__ import annotations

import asyncio
import json
import os
import signal

import pytest

from edge_agent.generation import wire
from edge_agent.generation.supervisor import GenerationConfig, GenerationSupervisor
from edgefl.errors import ConfigError
from tests.language_models import write_stages


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tail": "host"}, "--generate-tail 'host' is not of the form HOST:PORT"),
        ({"tail": ":9"}, "is not of the form"),
        ({"format": "int8"}, "--generate-format 'int8' is unknown; expected one of: fp32, fp16, bf16"),
        ({"memory_mb": -1}, "must be 0"),
    ],
)
def test_options_that_cannot_be_used(tmp_path, changes, words) -> None:
    with pytest.raises(ConfigError, match=words):
        GenerationConfig(**{"folder": tmp_path} | changes)
    with pytest.raises(ConfigError, match="is no folder"):
        GenerationConfig(folder=tmp_path / "none")


def test_a_killed_process_starts_again_and_requests_wait_for_it(tmp_path, alive) -> None:
    write_stages(tmp_path, None)

    async def models(address):
        reader, writer = await asyncio.open_unix_connection(address.encode("latin-1"))
        writer.write(wire.line(wire.ForwardedRequest(method="GET", path="/v1/models", length=0)))
        head = wire.parse_head(await reader.readline())
        body = await wire.read_piece(reader)
        writer.close()
        return head.status, json.loads(body)

    async def run():
        supervisor = GenerationSupervisor(GenerationConfig(folder=tmp_path / "whole"), device="cam", tls_home=None)
        running = asyncio.create_task(supervisor.run())
        pids = []
        for _ in range(2):
            while (await models(supervisor.address))[0] != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            pids.append(supervisor.pid)
            os.kill(supervisor.pid, signal.SIGKILL)
            while supervisor.pid == pids[-1]:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        return pids

    pids = asyncio.run(run())
    assert len(set(pids)) == 2
    assert not any(alive(pid) for pid in pids)
