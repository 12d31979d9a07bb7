"""The lower bound's protocol: three gRPC methods over bytes, 4 MB chunks, mutual TLS."""

from __future__ import annotations

from collections.abc import Iterator

SERVICE = "floor.Floor"
LISTEN = "Listen"  # one empty request, then an empty message for each round
DOWN = "Down"  # one empty request, then the model in chunks
UP = "Up"  # SHA-256 of the update first, then the update in chunks; an empty reply when it is on disk
CHUNK_BYTES = 4 << 20
OPTIONS = (("grpc.max_receive_message_length", 8 << 20), ("grpc.max_send_message_length", 8 << 20))


def chunks(data: bytes | memoryview) -> Iterator[bytes]:
    """Split into messages."""
    view = memoryview(data)
    return (bytes(view[start : start + CHUNK_BYTES]) for start in range(0, len(view), CHUNK_BYTES))
