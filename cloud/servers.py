"""The gRPC server of a cloud or a region: the port with its limits, and the services on it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc

from cloud.dataplane.grpc_port import DATA_PLANE_PACE, GrpcPort, PortPace
from cloud.shares import Shares
from edgefl.protocols.chunks import MAX_MESSAGE_BYTES
from edgefl.protocols.ports.listener import listen
from edgefl.protocols.tls import Identity, grpc_server_credentials

STOP_GRACE_S = 5.0

_CHANNEL = (
    ("grpc.so_reuseport", 0),
    # A fixed window bounds what devices send before their upload gets its turn (FleetService.Upload).
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 512 << 10),
    ("grpc.http2.max_frame_size", 1 << 20),  # one frame per chunk, not 64
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),  # agents ping less often
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PortKind:
    """What differs between the gRPC ports of a fleet."""

    option: str = "--grpc-port"  # that sets its number
    max_message_bytes: int = MAX_MESSAGE_BYTES
    pace: PortPace = DATA_PLANE_PACE  # calls of a device


DATA_PLANE = PortKind()

MakeHandlers = Callable[[GrpcPort, ThreadPoolExecutor], Sequence[Any]]  # of grpc.GenericRpcHandler


@contextlib.asynccontextmanager
async def serve_grpc(
    host: str, port_number: int, identity: Identity | None, shares: Shares, make_handlers: MakeHandlers,
    kind: PortKind = DATA_PLANE,
) -> AsyncIterator[None]:  # fmt: skip
    """Serve within the block, with mutual TLS if there is an identity; raises ConfigError for a port in use."""
    listen(host, port_number, kind.option).close()  # its error is clearer than gRPC's
    sizes = [(f"grpc.max_{way}_message_length", kind.max_message_bytes) for way in ("send", "receive")]
    port = GrpcPort(shares.devices, port_number, shares.full(), asyncio.get_running_loop().time, kind.pace)
    server = grpc.aio.server(options=[*sizes, *_CHANNEL, *port.options])
    workers = ThreadPoolExecutor(8, "data-plane")
    server.add_generic_rpc_handlers(tuple(make_handlers(port, workers)))
    address = f"{host}:{port_number}"
    if identity is None:
        server.add_insecure_port(address)
    else:
        server.add_secure_port(address, grpc_server_credentials(identity))
    await server.start()
    with unwrapped():
        async with asyncio.TaskGroup() as tasks:  # if the watch fails, the cloud stops
            watch = tasks.create_task(port.watch(), name="grpc-connections")
            try:
                yield
            finally:
                watch.cancel()
                await server.stop(STOP_GRACE_S)
                workers.shutdown(wait=True)


@contextlib.contextmanager
def unwrapped() -> Iterator[None]:
    """Unwrap the error of a task group if it is only one, so that a port in use is reported as such."""
    try:
        yield
    except BaseExceptionGroup as group:
        if len(group.exceptions) == 1:
            raise group.exceptions[0] from group.exceptions[0].__cause__
        raise
