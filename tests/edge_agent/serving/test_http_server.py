"""The server around an application: what has begun is answered before it ends."""

from __future__ import annotations

import asyncio

import httpx

from edge_agent.serving.api import bind, url_of
from edge_agent.serving.http_server import Cork, make_server, serve


def test_a_request_that_has_begun_is_answered():
    async def inside():
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def app(_scope, _receive, send):
            begun.set()
            await go_on.wait()
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
            await send({"type": "http.response.body", "body": b"ok"})

        listener = bind("127.0.0.1", 0)
        serving = asyncio.create_task(serve(make_server(app), listener))
        async with httpx.AsyncClient(base_url=url_of(listener), trust_env=False) as client:
            asked = asyncio.create_task(client.get("/"))
            await begun.wait()
            serving.cancel()
            go_on.set()
            answer = await asked
        assert answer.text == "ok"
        assert "server" not in answer.headers
        await asyncio.gather(serving, return_exceptions=True)
        listener.close()

    asyncio.run(inside())


def test_clients_that_are_parted_with_connect_anew_after_the_answer_under_way():
    async def inside():
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def app(scope, _receive, send):
            if scope["path"] == "/slow":
                begun.set()
                await go_on.wait()
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
            await send({"type": "http.response.body", "body": b"ok"})

        listener = bind("127.0.0.1", 0)
        server = make_server(app)
        serving = asyncio.create_task(serve(server, listener))
        idle, busy = [await asyncio.open_connection(*listener.getsockname()) for _ in range(2)]
        idle[1].write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await idle[0].readuntil(b"ok")).startswith(b"HTTP/1.1 200")
        busy[1].write(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n")
        await begun.wait()
        server.disconnect_clients()
        assert await idle[0].read() == b""
        go_on.set()
        assert (await busy[0].read()).endswith(b"ok")  # and then its end
        for _, writer in (idle, busy):
            writer.close()
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        listener.close()

    asyncio.run(inside())


class Written:
    """A transport that keeps what is written to it."""

    def __init__(self):
        self.parts, self.closed = [], False

    def write(self, data):
        self.parts.append(data)

    def close(self):
        self.closed = True


def test_head_and_body_leave_together():
    transport = Written()
    cork = Cork(transport)
    cork.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    cork.write(b"HTTP/1.1 200 OK\r\n\r\n")
    cork.write(b"body")
    cork.write(b"more")
    cork.write(b"HTTP/1.1 204 No Content\r\n\r\n")
    cork.flush()
    cork.flush()
    cork.write(b"HTTP/1.1 200 OK\r\n\r\n")
    cork.close()
    assert transport.parts == [
        b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\nbody", b"more", b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
    ]  # fmt: skip
    assert transport.closed
