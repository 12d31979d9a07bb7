"""The serving process's way to the generation process: what passes, and what a client sees if that dies."""

from __future__ import annotations

import asyncio
import json

import pytest

from edge_agent.generation import proxy as module
from edge_agent.generation import wire
from edge_agent.generation.proxy import GenerationProxy


class Asgi:
    """What a server gives and gets."""

    def __init__(self) -> None:
        self.sent, self.gone = [], asyncio.Event()

    async def send(self, message) -> None:
        self.sent.append(message)

    async def receive(self):
        await self.gone.wait()
        return {"type": "http.disconnect"}

    @property
    def status(self):
        return self.sent[0]["status"]

    @property
    def body(self):
        return b"".join(one.get("body", b"") for one in self.sent[1:])


def forwarded(serve, body=b"{}", before=None):
    """Forward one request to a process that `serve` plays; return what the client got."""

    async def run():
        listener, address = wire.listen_privately()
        server = await asyncio.start_unix_server(serve, sock=listener)
        asgi = Asgi()
        async with server:
            if before is not None:
                asyncio.get_running_loop().call_later(*before, asgi.gone.set)
            await GenerationProxy(address).forward("POST", "/v1/completions", body, asgi.send, asgi.receive)
        return asgi

    return asyncio.run(run())


async def read_request(reader):
    request = wire.parse_forwarded(await reader.readline())
    return request, await reader.readexactly(request.length)


def test_a_response_passes_as_it_is() -> None:
    async def serve(reader, writer):
        request, body = await read_request(reader)
        assert (request.method, request.path, body) == ("POST", "/v1/completions", b'{"a":1}')
        writer.write(wire.line(wire.ResponseHead(status=418, type=wire.JSON)))
        writer.write(wire.piece(b"ab") + wire.piece(b"c") + wire.piece(b""))
        writer.close()

    seen = forwarded(serve, b'{"a":1}')
    assert (seen.status, seen.body) == (418, b"abc")
    assert (b"content-length", b"3") in seen.sent[0]["headers"]


def test_events_pass_one_by_one() -> None:
    async def serve(reader, writer):
        await read_request(reader)
        writer.write(wire.line(wire.ResponseHead(status=200, type=wire.EVENTS)))
        for data in (b"data: 1\n\n", b"data: [DONE]\n\n", b""):
            writer.write(wire.piece(data))
        writer.close()

    seen = forwarded(serve)
    assert [one["body"] for one in seen.sent[1:]] == [b"data: 1\n\n", b"data: [DONE]\n\n", b""]
    assert (b"content-type", b"text/event-stream; charset=utf-8") in seen.sent[0]["headers"]


@pytest.mark.parametrize("head", [b"", b"nonsense\n", wire.line(wire.ResponseHead(status=200, type=wire.JSON)) + b"\5"])
def test_a_process_that_dies_is_an_error(head) -> None:
    async def serve(reader, writer):
        await read_request(reader)
        writer.write(head)
        writer.close()

    seen = forwarded(serve)
    assert (seen.status, json.loads(seen.body)["error"]["code"]) == (503, "generation_ended")
    assert (b"retry-after", b"1") in seen.sent[0]["headers"]


def test_a_process_that_dies_in_a_stream_is_its_last_event() -> None:
    async def serve(reader, writer):
        await read_request(reader)
        writer.write(wire.line(wire.ResponseHead(status=200, type=wire.EVENTS)) + wire.piece(b"data: 1\n\n"))
        writer.close()

    seen = forwarded(serve)
    first, last = seen.body.decode().strip().split("\n\n")
    assert first == "data: 1"
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "generation_ended"


@pytest.mark.parametrize(("address", "status"), [("\0edgefl-nobody-listens", 503), ("", 404)])
def test_no_process_is_an_error(address, status) -> None:
    async def run():
        asgi = Asgi()
        await GenerationProxy(address).forward("GET", "/v1/models", b"", asgi.send, asgi.receive)
        return asgi

    assert asyncio.run(run()).status == status


def test_a_client_that_is_gone_closes_the_connection() -> None:
    ended = []

    async def serve(reader, writer):
        await read_request(reader)
        writer.write(wire.line(wire.ResponseHead(status=200, type=wire.EVENTS)))
        ended.append(await reader.read())
        writer.close()

    seen = forwarded(serve, before=(0.1,))
    assert ended == [b""]
    assert seen.sent[0]["status"] == 200


def test_a_large_body_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(module.wire, "MAX_BODY_BYTES", 10)

    async def serve(_reader, writer):
        writer.close()

    seen = forwarded(serve, b"x" * 11)
    assert (seen.status, json.loads(seen.body)["error"]["code"]) == (413, "too_large")
