"""The agent's side: options, a process that is started again, and requests that wait for it."""

from __future__ import annotations

import asyncio
import json
import os
import signal

import pytest

from edge_agent.generation import supervisor as module
from edge_agent.generation import wire
from edge_agent.generation.supervisor import (
    GenerationCallbacks,
    GenerationConfig,
    GenerationPlace,
    GenerationSupervisor,
)
from edge_agent.releases.model_file import ModelFile
from edgefl.errors import ConfigError, ProtocolError
from edgefl.protocols.fields import to_json
from edgefl.protocols.inference.texts import TextStage
from edgefl.protocols.messages import BlobRef
from tests.language_models import write_stages

PLACE = GenerationPlace(device="cam", tls_home=None)
REF = BlobRef(sha256="a" * 64, size=7)


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


async def models(address):
    reader, writer = await asyncio.open_unix_connection(address.encode("latin-1"))
    writer.write(wire.line(wire.ForwardedRequest(method="GET", path="/v1/models", length=0)))
    head = wire.parse_head(await reader.readline())
    body = await wire.read_piece(reader)
    writer.close()
    return head.status, json.loads(body)


def test_a_killed_process_starts_again_and_requests_wait_for_it(tmp_path, alive) -> None:
    write_stages(tmp_path, None)

    async def run():
        supervisor = GenerationSupervisor(GenerationConfig(folder=tmp_path / "whole"), PLACE)
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


def release(folder, version):
    stage = TextStage(record=REF, tokenizer=REF)
    return ModelFile(name="tiny", version=version, path=folder / "model.onnx", text=json.dumps(to_json(stage)))


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.02)


def test_a_release_takes_over_when_it_was_tried_and_the_address_is_told(tmp_path, alive) -> None:
    write_stages(tmp_path / "1", None)
    write_stages(tmp_path / "2", None, seed=3)
    told = []

    async def run():
        supervisor = GenerationSupervisor(None, PLACE, GenerationCallbacks(address=told.append))
        running = asyncio.create_task(supervisor.run())
        assert (supervisor.address, supervisor.versions()) == ("", {})
        pids = []
        for version in (1, 2):
            staged = await supervisor.prepare(release(tmp_path / f"{version}" / "whole", version), trial=True)
            assert supervisor.versions() == ({"tiny": version - 1} if version > 1 else {})
            staged.switch()
            assert supervisor.versions() == {"tiny": version}
            await until(lambda: supervisor.pid is not None and supervisor.pid not in pids)
            pids.append(supervisor.pid)
            assert (await models(supervisor.address))[0] == 200  # it waits for the model
        assert told == [supervisor.address] * 2
        with pytest.raises(ProtocolError, match="is not a stage of a language model"):
            await supervisor.prepare(release(tmp_path, 3), trial=True)
        assert supervisor.versions() == {"tiny": 2}
        running.cancel()
        await asyncio.wait([running])
        return pids

    pids = asyncio.run(run())
    assert not any(alive(pid) for pid in pids)


def test_a_release_that_ends_its_process_again_and_again_is_told(tmp_path, monkeypatch) -> None:
    write_stages(tmp_path, None)
    monkeypatch.setattr(module, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(module, "LONGEST_PAUSE_S", 0.01)
    failing = []

    async def run():
        callbacks = GenerationCallbacks(failing=lambda model, reason: failing.append((model, reason)))
        supervisor = GenerationSupervisor(None, PLACE, callbacks)
        running = asyncio.create_task(supervisor.run())
        model = release(tmp_path / "whole", 1)
        supervisor.take_over(model)
        for _ in range(module.MAX_DEATHS):
            await until(lambda: supervisor.pid is not None)
            pid = supervisor.pid
            assert failing == []
            os.kill(pid, signal.SIGKILL)
            await until(lambda pid=pid: supervisor.pid != pid)
        await until(lambda: failing)
        assert failing == [(model, "the generation process ended 4 times within 30 s of its start")]
        running.cancel()
        await asyncio.wait([running])

    asyncio.run(run())


def test_an_own_model_is_not_replaced(tmp_path) -> None:
    write_stages(tmp_path, None)

    async def run():
        supervisor = GenerationSupervisor(GenerationConfig(folder=tmp_path / "whole"), PLACE)
        running = asyncio.create_task(supervisor.run())
        await asyncio.sleep(0)  # it closes the socket at its end, if it has begun
        assert supervisor.address
        with pytest.raises(ProtocolError, match="was started with --generate"):
            await supervisor.prepare(release(tmp_path / "whole", 1), trial=False)
        assert supervisor.versions() == {}
        running.cancel()
        await asyncio.wait([running])

    asyncio.run(run())
