"""The generation process: which stages it takes, and its answers over its socket."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import signal

import pytest

from edge_agent.generation import wire
from edge_agent.generation.generation_main import GenerationProcess
from tests.language_models import write_stages


@pytest.fixture
def folders(tmp_path):
    write_stages(tmp_path, 2)
    write_stages(tmp_path, None)
    return tmp_path


@contextlib.asynccontextmanager
async def running(folder, **given):
    options = {"folder": folder, "tail": "", "tail_model": "", "format": "fp32", "home": "", "device": "cam",
               "memory_mb": 0, "log_level": logging.INFO}  # fmt: skip
    listener, address = wire.listen_privately()
    process = asyncio.create_task(GenerationProcess(argparse.Namespace(**options | given), listener).run())
    try:
        yield address.encode("latin-1")
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        await process


async def ask(address, path, body=b"", method="GET"):
    reader, writer = await asyncio.open_unix_connection(address)
    writer.write(wire.line(wire.ForwardedRequest(method=method, path=path, length=len(body))) + body)
    head = wire.parse_head(await reader.readline())
    parts = []
    while data := await wire.read_piece(reader):
        parts.append(data)
    writer.close()
    return head.status, json.loads(b"".join(parts))


async def ready(address):
    while (answer := await ask(address, "/v1/models"))[0] != 200:
        assert "still being loaded" in answer[1]["error"]["message"], answer
        await asyncio.sleep(0.02)


def test_a_whole_model_generates(folders) -> None:
    async def run():
        async with running(folders / "whole") as address:
            await ready(address)
            body = json.dumps({"model": "tiny", "prompt": "hello", "max_tokens": 5, "temperature": 0}).encode()
            return await ask(address, "/v1/completions", body, "POST")

    status, made = asyncio.run(run())
    assert (status, made["usage"]["completion_tokens"]) == (200, 5)


def test_a_model_that_does_not_fit_is_refused_in_words_at_each_request(folders) -> None:
    async def run():
        async with running(folders / "whole", memory_mb=1) as address:
            while "loaded" in (answer := await ask(address, "/v1/models"))[1]["error"]["message"]:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            return answer

    status, made = asyncio.run(run())
    assert status == 503
    assert "the whole model tiny needs about" in made["error"]["message"]


def test_a_client_that_is_gone_ends_its_text(folders) -> None:
    async def run():
        async with running(folders / "whole") as address:
            await ready(address)
            body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 255, "stream": True}).encode()
            for _ in range(6):  # more than are generated at a time: those that are gone give their places back
                reader, writer = await asyncio.open_unix_connection(address)
                writer.write(wire.line(wire.ForwardedRequest(method="POST", path="/v1/completions", length=len(body))))
                writer.write(body)
                await reader.readline()
                writer.close()
            small = json.dumps({"model": "tiny", "prompt": "hello", "max_tokens": 2}).encode()
            return (await ask(address, "/v1/completions", small, "POST"))[0]

    assert asyncio.run(run()) == 200


def test_a_connection_without_a_request_is_closed(folders) -> None:
    async def run():
        async with running(folders / "whole") as address:
            reader, writer = await asyncio.open_unix_connection(address)
            writer.write(b"hello\n")
            assert await reader.read() == b""
            writer.close()

    asyncio.run(run())
