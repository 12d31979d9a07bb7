"""Half-sent requests, over real sockets: deadlines, room for others, and limits on the work alone."""

import asyncio
import contextlib
import json
import socket

import httpx
import pytest
import uvicorn

from edgefl.errors import PartFailed
from edgefl.protocols.ports.connections import MAX_LEAVING
from edgefl.protocols.ports.http_limits import HttpLimits, LimitedServer, RequestLimit

HALF_HEADERS = b"GET / HTTP/1.1\r\nHost: x\r\nX-A: "
HALF_BODY = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n123"
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def echo(scope, receive, send):
    """Answer with the body, and read it all first."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body += message["body"]
        more = message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@contextlib.asynccontextmanager
async def serving(app=echo, http="h11", **limits):
    config = uvicorn.Config(
        app, http=http, lifespan="off", ws="none", log_config=None, access_log=False, timeout_graceful_shutdown=1
    )
    server = LimitedServer(config, HttpLimits(**limits), "test")
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        async with asyncio.timeout(60):
            yield port, server
    finally:
        server.should_exit = True
        server.abort_all()
        await task


async def send(port, data):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    await writer.drain()
    return reader, writer


async def get(port, body=None):
    async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
        return await client.request("POST" if body else "GET", f"http://127.0.0.1:{port}/", content=body)


async def answer_to(port, data):
    reader, writer = await send(port, data)
    answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.partition(b"\r\n")[0], json.loads(body) if body else None


def run(main):
    return asyncio.run(main())


@pytest.fixture(params=["h11", "httptools"])
def http(request):
    pytest.importorskip(request.param)
    return request.param


@pytest.mark.parametrize("half", [HALF_HEADERS, HALF_BODY])
def test_a_half_request_is_answered_408_at_its_deadline(http, half):
    async def main():
        async with serving(http=http, headers_s=0.2, body_s=0.2) as (port, _):
            return await answer_to(port, half)

    status, body = run(main)
    assert status == b"HTTP/1.1 408 Request Timeout"
    assert list(body) == ["error"]


def test_a_connection_that_says_nothing_is_closed_without_a_word(http):
    async def main():
        async with serving(http=http, headers_s=0.2) as (port, _):
            return await answer_to(port, b"")

    assert run(main) == (b"", None)


def test_bytes_that_trickle_do_not_move_the_deadline_of_headers(http):
    async def main():
        async with serving(http=http, headers_s=0.5) as (port, _):
            reader, writer = await send(port, HALF_HEADERS)

            async def trickle():
                while True:
                    writer.write(b"a")
                    await asyncio.sleep(0.05)

            task, answer = asyncio.create_task(trickle()), b""
            with contextlib.suppress(ConnectionResetError):  # a byte was under way when it ended
                while data := await reader.read(4096):
                    answer += data
            task.cancel()
            writer.close()
            return answer

    assert run(main)[:12] in {b"HTTP/1.1 408", b""}  # in any case it comes to an end


def test_a_body_that_is_slow_but_moves_is_waited_for(http):
    async def main():
        async with serving(http=http, body_s=0.3, body_bytes_per_s=10) as (port, _):
            reader, writer = await send(port, b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 160\r\n\r\n")
            for _ in range(8):  # 160 bytes in 0.8 s are due after 0.3 + 16 s
                writer.write(b"x" * 20)
                await asyncio.sleep(0.1)
            answer = await reader.readuntil(b"x" * 160)
            writer.close()
            return answer

    assert run(main).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("half", [b"", HALF_HEADERS, HALF_BODY])
def test_many_halves_make_room_for_one_who_asks(http, half):
    async def main():
        async with serving(http=http, max_connections=40, max_waiting=8) as (port, server):
            halves = [await send(port, half) for _ in range(100)]
            assert (await get(port)).status_code == 200
            assert (await get(port, b"whole")).content == b"whole"
            assert len(server.held) <= 8 + MAX_LEAVING + 1
            for _, writer in halves:
                writer.close()

    run(main)


def test_who_is_worked_for_is_not_closed_for_others(http):
    async def main():
        begun, go = asyncio.Event(), asyncio.Event()

        async def slow(scope, receive, send):
            begun.set()
            await go.wait()
            await echo(scope, receive, send)

        async with serving(slow, http=http, max_connections=40, max_waiting=2, headers_s=0.1, idle_s=0.1) as (port, _):
            asking = asyncio.create_task(get(port, b"work"))
            await begun.wait()
            halves = [await send(port, HALF_HEADERS) for _ in range(20)]
            assert [await reader.read() != b"" for reader, _ in halves] == [True] * 20  # all were told
            go.set()
            assert (await asking).content == b"work"
            for _, writer in halves:
                writer.close()

    run(main)


def test_requests_on_one_connection_go_on(http):
    async def main():
        async with serving(http=http, headers_s=5) as (port, server):
            async with httpx.AsyncClient(trust_env=False) as client:
                for number in range(20):
                    answer = await client.post(f"http://127.0.0.1:{port}/", content=str(number))
                    assert answer.text == str(number)
                assert len(server.held) == 1
            reader, writer = await send(port, GET * 3)  # pipelined
            for _ in range(3):
                await reader.readuntil(b"content-length: 0\r\n")
            writer.close()

    run(main)


def test_one_who_does_not_read_his_answer_is_cut_off(http):
    async def large(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(1000):
            await send({"type": "http.response.body", "body": bytes(1 << 20), "more_body": True})
        gone.set()

    gone = asyncio.Event()

    async def main():
        async with serving(large, http=http, reader_s=0.2) as (port, _):
            _, writer = await send(port, GET)
            writer.transport.pause_reading()
            await gone.wait()
            writer.transport.abort()

    run(main)


def test_what_is_not_http_is_answered_in_json(http):
    async def main():
        async with serving(http=http) as (port, _):
            return await answer_to(port, b"\x00\x01\x02 nonsense\r\n\r\n")

    status, body = run(main)
    assert status == b"HTTP/1.1 400 Bad Request"
    assert body == {"error": "Invalid HTTP request received."}


def test_only_requests_at_work_are_limited_and_places_are_kept_for_the_known(http):
    async def main():
        begun, go = asyncio.Semaphore(0), asyncio.Event()

        async def slow(scope, receive, send):
            if dict(scope["headers"]).get(b"x-slow"):
                begun.release()
                await go.wait()
            await echo(scope, receive, send)

        def known(scope):
            return dict(scope["headers"]).get(b"authorization") == b"right"

        limited = RequestLimit(slow, max_active=3, reserved=1, vouches=known)
        async with serving(limited, http=http) as (port, _):
            halves = [await send(port, HALF_BODY) for _ in range(10)]
            url = f"http://127.0.0.1:{port}/"
            async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
                at_work = [asyncio.create_task(client.get(url, headers={"x-slow": "1"})) for _ in range(2)]
                for _ in at_work:
                    await begun.acquire()
                refused = await client.get(url)
                late = await client.post(url, content=b"abc")
                taken = await client.get(url, headers={"authorization": "right"})
                go.set()
                assert [one.status_code for one in await asyncio.gather(*at_work)] == [200, 200]
                assert (await client.get(url)).status_code == 200
            for _, writer in halves:
                writer.close()
        assert (refused.status_code, refused.headers["retry-after"], late.status_code) == (503, "2", 503)
        assert "2 requests are running" in refused.json()["error"]
        assert taken.status_code == 200

    run(main)


def test_a_server_that_does_not_accept_any_more_ends():
    async def main():
        config = uvicorn.Config(echo, lifespan="off", ws="none", log_config=None)
        server = LimitedServer(config, HttpLimits(), "test")
        with socket.create_server(("127.0.0.1", 0)) as listening:
            listening.shutdown(socket.SHUT_RDWR)
            async with asyncio.timeout(30):
                await server.serve(sockets=[listening])

    with pytest.raises(PartFailed, match=r"test: connections are not accepted any more: OSError"):
        asyncio.run(main())
