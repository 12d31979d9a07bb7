"""One client of the lower bound: in each round it downloads the model, hashes it, and sends it back.

Run as `python -m benchmarks.floor_client PORT FOLDER`; FOLDER has its key, certificate and CA.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc

from benchmarks.floor_wire import DOWN, LISTEN, OPTIONS, SERVICE, UP
from edgefl.protocols import tls


async def take_part(port: int, identity: tls.Identity) -> None:
    """Echo the model in every round until the server ends."""
    credentials = tls.grpc_channel_credentials(identity)
    async with grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, OPTIONS) as channel:
        listen = channel.unary_stream(f"/{SERVICE}/{LISTEN}", bytes, bytes)
        down = channel.unary_stream(f"/{SERVICE}/{DOWN}", bytes, bytes)
        up = channel.stream_unary(f"/{SERVICE}/{UP}", bytes, bytes)
        async for _round in listen(b""):
            model, digest = [], hashlib.sha256()
            async for chunk in down(b""):
                digest.update(chunk)
                model.append(chunk)
            await up(_parts(model))


async def _parts(update: list[bytes]) -> AsyncIterator[bytes]:
    digest = hashlib.sha256()
    for chunk in update:
        digest.update(chunk)
    yield digest.digest()
    for chunk in update:
        yield chunk


if __name__ == "__main__":
    asyncio.run(take_part(int(sys.argv[1]), tls.Identity.in_folder(Path(sys.argv[2]))))
