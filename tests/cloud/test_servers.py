"""The gRPC server of a cloud or a region: mutual TLS, a port in use, and an end that lets calls end."""

import asyncio
import socket

import grpc
import pytest

from cloud.servers import PortKind, serve_grpc
from cloud.shares import Shares
from edgefl.errors import ConfigError
from edgefl.protocols import tls

SHARES = Shares.of(4096, builtin_broker=True)


class Echo(grpc.GenericRpcHandler):
    def service(self, details):
        async def echo(request, _context):
            return request

        return grpc.unary_unary_rpc_method_handler(echo) if details.method == "/test/Echo" else None


def handlers(_port, _workers):
    return [Echo()]


async def said(channel):
    async with channel:
        return await channel.unary_unary("/test/Echo")(b"hello", timeout=10)


def test_only_members_of_the_fleet_are_served(fleet_ca, strange_ca, free_port):
    async def run():
        async with serve_grpc("127.0.0.1", free_port, fleet_ca.cloud, SHARES, handlers):
            target = f"127.0.0.1:{free_port}"
            assert await said(grpc.aio.secure_channel(target, tls.grpc_channel_credentials(fleet_ca.device("a"))))
            for stranger in (
                grpc.aio.secure_channel(target, tls.grpc_channel_credentials(strange_ca.device("a"))),
                grpc.aio.insecure_channel(target),
            ):
                with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
                    await said(stranger)

    asyncio.run(run())


def test_without_an_identity_it_serves_without_tls(free_port):
    async def run():
        async with serve_grpc("127.0.0.1", free_port, None, SHARES, handlers):
            return await said(grpc.aio.insecure_channel(f"127.0.0.1:{free_port}"))

    assert asyncio.run(run()) == b"hello"


def test_a_port_in_use_is_named_with_its_option(fleet_ca):
    async def run(port):
        async with serve_grpc("127.0.0.1", port, fleet_ca.cloud, SHARES, handlers):
            pass

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"{port}.*|--grpc-port"):
            asyncio.run(run(port))


def test_another_kind_of_port_has_its_own_option_and_size_of_messages(free_port):
    kind = PortKind(option="--port", max_message_bytes=1000)

    async def run(port):
        async with serve_grpc("127.0.0.1", port, None, SHARES, handlers, kind):
            channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
            async with channel:
                await channel.unary_unary("/test/Echo")(b"x" * 1000, timeout=10)
                with pytest.raises(grpc.aio.AioRpcError, match="RESOURCE_EXHAUSTED"):
                    await channel.unary_unary("/test/Echo")(b"x" * 1001, timeout=10)

    asyncio.run(run(free_port))
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="--port"):
        asyncio.run(run(taken.getsockname()[1]))


def test_an_error_of_the_block_is_raised_as_it_is(free_port):
    async def run():
        async with serve_grpc("127.0.0.1", free_port, None, SHARES, handlers):
            raise ConfigError("of the block")

    with pytest.raises(ConfigError, match="of the block"):
        asyncio.run(run())
