"""The server itself: a port that is taken, a clean stop with open streams, signals left alone."""

from __future__ import annotations

import asyncio
import signal
import socket

import httpx
import pytest

from cloud.http.server import serve_http
from edgefl.errors import ConfigError
from edgefl.protocols.ports.http_limits import LimitedServer
from edgefl.protocols.ports.listener import listen


async def hello(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


async def never_ends(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"begun", "more_body": True})
    await asyncio.Event().wait()


def test_port_0_takes_a_free_one_and_gives_it():
    async def main():
        async with serve_http(hello, "127.0.0.1", 0, None) as port, httpx.AsyncClient(trust_env=False) as client:
            return (await client.get(f"http://127.0.0.1:{port}/")).text

    assert asyncio.run(main()) == "hello"


def test_a_port_in_use_is_an_error_that_says_what_to_do():
    async def main(port):
        async with serve_http(hello, "127.0.0.1", port, None):
            pass

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot listen on 127.0.0.1:{port}: .*choose another --http-port"):
            asyncio.run(main(port))


def test_the_port_is_free_again_after_the_stop_even_with_a_stream_open():
    async def main():
        async with serve_http(never_ends, "127.0.0.1", 0, None) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await reader.readuntil(b"begun")
        writer.close()
        async with serve_http(hello, "127.0.0.1", port, None) as again:
            assert again == port

    asyncio.run(main())


def test_answers_do_not_wait_for_acknowledgements():
    async def main():
        with listen("127.0.0.1", 0, "--http-port") as listener:
            listener.setblocking(False)
            accepted = asyncio.get_running_loop().create_future()

            class Connection(asyncio.Protocol):
                def connection_made(self, transport):
                    connection = transport.get_extra_info("socket")
                    accepted.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
                    transport.abort()

            async with await asyncio.get_running_loop().create_server(Connection, sock=listener):
                _, writer = await asyncio.open_connection(*listener.getsockname())
                writer.close()
                return await accepted

    assert asyncio.run(main()) == 1  # else Nagle's algorithm holds each answer back for 44 ms


def test_signals_stay_with_the_process_that_serves():
    before = signal.getsignal(signal.SIGTERM)

    async def main():
        async with serve_http(hello, "127.0.0.1", 0, None):
            await asyncio.sleep(0.05)
            return signal.getsignal(signal.SIGTERM)

    assert asyncio.run(main()) is before


def test_a_server_that_ends_unasked_is_heard_of(monkeypatch) -> None:
    async def fail(*_: object) -> None:
        raise ZeroDivisionError

    async def serve() -> None:
        monkeypatch.setattr(LimitedServer, "serve", fail)
        ends: asyncio.Queue[BaseException] = asyncio.Queue()
        with pytest.raises(ZeroDivisionError):
            async with serve_http(hello, "127.0.0.1", 0, None, on_end=ends.put_nowait):
                assert isinstance(await asyncio.wait_for(ends.get(), 5), ZeroDivisionError)

    asyncio.run(serve())
