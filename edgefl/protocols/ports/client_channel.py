"""gRPC channels of the data plane's clients, devices and regions: their options, and how one is replaced.

A channel is replaced when its certificate is: new calls use the new one, running calls end on the old one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from contextlib import suppress
from typing import Any, TypeVar

import grpc

from edgefl.errors import ParentLeft
from edgefl.protocols.tls import Identity, grpc_channel_credentials

_T = TypeVar("_T")
TRANSFER_S = 120.0  # for transfers on a replaced connection; longer ones resume on the new connection
_MAX_MESSAGE_BYTES = 16 << 20
_OPTIONS = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    # Reconnect to a restarted cloud within two seconds. gRPC adds 20% jitter.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1500),
    # Keepalive during calls only: `Next` detects a dead connection, and an idle device sends nothing.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.enable_http_proxy", 0),
    ("grpc.http2.max_frame_size", 1 << 20),
)


def open_channel(target: str, identity: Identity | None, server_name: str = "") -> grpc.aio.Channel:
    """Return a channel with the identity's present certificate; without an identity, one without TLS.

    The server's certificate must have the target's host, or `server_name` if that is given.
    """
    if identity is None:
        return grpc.aio.insecure_channel(target, options=_OPTIONS)
    named = (("grpc.ssl_target_name_override", server_name),) if server_name else ()
    return grpc.aio.secure_channel(target, grpc_channel_credentials(identity), options=(*_OPTIONS, *named))


async def close_after(channel: grpc.aio.Channel, calls: Iterable[Any]) -> None:
    """Close a channel when its calls are done or after TRANSFER_S; immediately if this is cancelled.

    `channel.close(grace)` cannot be used: if it is cancelled, the channel stays open, and no later `close` closes it.
    """
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(TRANSFER_S):
                for call in list(calls):
                    await call.code()
    finally:
        await channel.close(None)


async def answered(step: Awaitable[_T]) -> _T:
    """Await a call, or one step of it; raises ParentLeft if its channel was replaced or closed.

    Not if this task was cancelled: then CancelledError.
    """
    try:
        return await step
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise ParentLeft("the device connects to another parent") from None


async def connected(call: Any) -> None:
    """Wait until a call, whose requests are written one by one, has a connection; raises what ends it before.

    gRPC's own wait, also that of the first `write`, would go on for ever if the call is cancelled meanwhile.
    """
    waiting = asyncio.ensure_future(call.wait_for_connection())
    call.add_done_callback(lambda _call: waiting.cancel())
    try:
        await asyncio.wait((waiting,))
        if waiting.cancelled():
            await answered(call)
        else:
            waiting.result()
    finally:
        waiting.cancel()
