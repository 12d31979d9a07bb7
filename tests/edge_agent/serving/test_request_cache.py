"""The fast path for requests with a cached head: the same responses as the server's; all others are left to it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from edge_agent.serving import Serving, bind
from edge_agent.serving.request_cache import MAX_CACHED, RequestCache
from edge_agent.sessions import Models, load
from edgefl.errors import ProtocolError

PATH = "/v2/models/affine/infer"
LENGTH = b"content-length"


class Wire:
    """One connection, and how many requests the server itself has read."""

    def __init__(self, serving: Serving, models: Models) -> None:
        self.serving, self.models, self.read = serving, models, 0
        answer = serving._answer

        async def watched(scope: Any, receive: Any) -> Any:
            self.read += 1
            return await answer(scope, receive)

        serving._answer = watched  # type: ignore[method-assign]

    async def connect(self, port: int) -> None:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", port)

    async def close(self) -> None:
        self._writer.close()
        with suppress(ConnectionError):
            await self._writer.wait_closed()

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    async def receive(self) -> tuple[int, dict[str, str], bytes]:
        async with asyncio.timeout(20):
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode()
            headers = dict(line.lower().split(": ", 1) for line in head.split("\r\n")[1:-2])
            return int(head.split()[1]), headers, await self._reader.readexactly(int(headers["content-length"]))

    async def ask(self, data: bytes) -> tuple[int, dict[str, str], bytes]:
        self.send(data)
        return await self.receive()


@pytest.fixture
def wired(tmp_path, onnx_model):
    """Run a coroutine function with a `Wire` to a server of `affine` (y = scale * x + 1); `load` makes versions."""

    def make(version: int = 1, scale: float = 2.0):
        path = tmp_path / f"{version}.onnx"
        path.write_bytes(onnx_model(scale))
        return load("affine", version, path)

    def run(function: Callable[[Wire], Awaitable[None]], token: str = "") -> None:
        async def inside() -> None:
            models, listener = Models(), bind("127.0.0.1", 0)
            models.put(make())
            serving = Serving(models, listener)
            serving.token, serving.ready = token, True
            wire = Wire(serving, models)
            running = asyncio.create_task(serving.run())
            try:
                await wire.connect(listener.getsockname()[1])
                await function(wire)
            finally:
                await wire.close()
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)

        asyncio.run(inside())

    run.load = make  # type: ignore[attr-defined]
    return run


def asked(body: bytes, *headers: str, path: str = PATH) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", *headers, f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


def in_json(*values: float, path: str = PATH, headers: tuple[str, ...] = ()) -> bytes:
    tensor = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": list(values)}
    return asked(json.dumps({"inputs": [tensor]}).encode(), *headers, path=path)


def in_binary(*values: float) -> bytes:
    tensor = {"name": "x", "shape": [1, 3], "datatype": "FP32", "parameters": {"binary_data_size": 12}}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return asked(head + np.array(values, np.float32).tobytes(), f"Inference-Header-Content-Length: {len(head)}")


def computed(body: bytes) -> list[float]:
    result: list[float] = json.loads(body)["outputs"][0]["data"]
    return result


@pytest.mark.parametrize("make", [in_json, in_binary])
def test_a_known_request_is_answered_as_the_server_answers_it(wired, make):
    async def run(wire: Wire) -> None:
        first = await wire.ask(make(1.0, 2.0, 3.0))
        again = await wire.ask(make(1.0, 2.0, 3.0))
        other = await wire.ask(make(4.0, 5.0, 6.0))
        assert wire.read == 1
        assert {name: value for name, value in first[1].items() if name != "date"} == {
            name: value for name, value in again[1].items() if name != "date"
        }
        assert (first[0], first[2]) == (again[0], again[2])
        assert again[1]["date"]
        if make is in_json:
            assert computed(other[2]) == [9.0, 11.0, 13.0]
        else:
            assert np.frombuffer(other[2][-12:], np.float32).tolist() == [9.0, 11.0, 13.0]

    wired(run)


def test_another_release_answers_at_once_and_a_version_that_went_is_refused(wired):
    named = in_json(1.0, 2.0, 3.0, path="/v2/models/affine/versions/1/infer")

    async def run(wire: Wire) -> None:
        for request in (in_json(1.0, 2.0, 3.0), named) * 2:
            assert computed((await wire.ask(request))[2]) == [3.0, 5.0, 7.0]
        assert wire.read == 2
        wire.models.put(wired.load(2, 10.0))
        assert computed((await wire.ask(in_json(1.0, 2.0, 3.0)))[2]) == [11.0, 21.0, 31.0]
        assert wire.read == 2
        status, _, body = await wire.ask(named)
        assert (status, wire.read) == (404, 3)
        assert b"has version 2 here" in body
        wire.models.drop("affine")
        assert (await wire.ask(in_json(1.0, 2.0, 3.0)))[0] == 404

    wired(run)


def test_what_is_wrong_in_a_body_is_told_by_the_server_and_what_follows_is_not_lost(wired):
    async def run(wire: Wire) -> None:
        good = in_json(1.0, 2.0, 3.0)
        await wire.ask(good)
        status, _, body = await wire.ask(good.replace(b"[1.0,", b'["1",'))
        assert (status, wire.read) == (400, 2)
        assert b"error" in body
        assert computed((await wire.ask(good))[2]) == [3.0, 5.0, 7.0]
        assert wire.read == 2

    wired(run)


def test_a_request_in_parts_and_several_at_once_are_for_the_server(wired):
    good = in_json(1.0, 2.0, 3.0)

    async def run(wire: Wire) -> None:
        await wire.ask(good)
        wire.send(good + good)
        for _ in range(2):
            assert computed((await wire.receive())[2]) == [3.0, 5.0, 7.0]
        assert wire.read == 3
        assert computed((await wire.ask(good))[2]) == [3.0, 5.0, 7.0]
        assert wire.read == 3

    wired(run)


@pytest.mark.parametrize(
    "headers", [("Connection: close",), ("Transfer-Encoding: identity",), ("Content-Encoding: identity",)]
)
def test_a_head_that_is_not_plain_is_not_learned(wired, headers):
    async def run(wire: Wire) -> None:
        serving, request = wire.serving, in_json(1.0, 2.0, 3.0, headers=headers)
        learned = RequestCache(lambda _name: None, lambda _served, _request: [], serving._allows)
        end = request.index(b"\r\n\r\n") + 4
        lines = request[: end - 4].decode().split("\r\n")[1:]
        pairs = [(name.lower().encode(), value.encode()) for name, value in (line.split(": ", 1) for line in lines)]
        scope = {"method": "POST", "http_version": "1.1", "path": PATH, "headers": pairs}
        learned.add(request, scope)
        assert not learned._heads
        learned.add(in_json(1.0, 2.0, 3.0), scope | {"headers": [p for p in pairs if p[0] in {b"host", LENGTH}]})
        assert len(learned._heads) == 1

    wired(run)


def test_the_token_is_part_of_what_is_known(wired):
    async def run(wire: Wire) -> None:
        right, wrong = (in_json(1.0, 2.0, 3.0, headers=(f"Authorization: Bearer {word}",)) for word in ("abc", "abd"))
        for _ in range(2):
            assert (await wire.ask(right))[0] == 200
            assert (await wire.ask(wrong))[0] == 401
        assert wire.read == 3

    wired(run, token="abc")  # noqa: S106 - of this test


def test_what_is_not_quick_is_for_the_server(wired):
    async def run(wire: Wire) -> None:
        good = in_json(1.0, 2.0, 3.0)
        served = wire.models.get("affine")
        assert served is not None
        await wire.ask(good)
        served.inline_limit.max_elements = 2
        assert computed((await wire.ask(good))[2]) == [3.0, 5.0, 7.0]
        assert wire.read == 2

    wired(run)


def test_heads_are_few_and_short():
    known = RequestCache(lambda _name: None, lambda _served, _request: [], lambda _scope: True)
    for number in range(3 * MAX_CACHED):
        request = in_json(1.0, 2.0, 3.0, headers=(f"X-Id: {number}",))
        pairs = [(b"host", b"x"), (b"x-id", b"%d" % number), (LENGTH, re.findall(rb"Length: (\d+)", request)[0])]
        known.add(request, {"method": "POST", "http_version": "1.1", "path": PATH, "headers": pairs})
        assert 1 <= len(known._heads) <= MAX_CACHED


@pytest.mark.parametrize(("raised", "is_logged"), [(ZeroDivisionError, True), (ProtocolError, False)])
def test_an_error_of_the_shortcut_alone_is_logged_and_the_request_left_to_the_server(
    tmp_path, onnx_model, caplog, raised, is_logged
):
    def run(*_: Any) -> list[Any]:
        raise raised("here")

    path = tmp_path / "1.onnx"
    path.write_bytes(onnx_model(2.0))
    cache = RequestCache({"affine": load("affine", 1, path)}.get, run, lambda _: True)
    request = in_json(1.0, 2.0, 3.0)
    headers = [
        tuple(part.strip() for part in line.lower().split(b":", 1))
        for line in request.split(b"\r\n\r\n")[0].split(b"\r\n")[1:]
    ]
    cache.add(request, {"method": "POST", "http_version": "1.1", "path": PATH, "headers": headers})
    assert cache._heads
    assert cache.respond(request) is None
    assert ("fast_path_failed" in caplog.text) == is_logged
