"""Encode and decode the data of `Chunk` and `UploadChunk` without protobuf objects.

A message with one field of bytes is a tag, a varint length and the bytes (Protocol Buffers encoding,
wire type 2). protobuf's own objects copy each chunk twice more on both sides, which costs as much as
encrypting it. Any valid form can be read; the form written here is read without a copy.
"""

from __future__ import annotations

from edgefl.protocols import fleet_pb2 as pb

CHUNK_BYTES = 1 << 20
MAX_MESSAGE_BYTES = CHUNK_BYTES + (64 << 10)

_CHUNK_TAG = b"\x0a"  # Chunk.data: field 1, bytes
_UPLOAD_TAG = b"\x12"  # UploadChunk.data: field 2, bytes


def encode_chunk(data: bytes | memoryview) -> bytes:
    """Return a serialized `Chunk`."""
    return b"".join((_CHUNK_TAG, _varint(len(data)), data))


def encode_upload(data: bytes | memoryview) -> bytes:
    """Return a serialized `UploadChunk` that holds data."""
    return b"".join((_UPLOAD_TAG, _varint(len(data)), data))


def chunk_data(message: bytes) -> memoryview:
    """Return the data of a serialized `Chunk`; raises protobuf's DecodeError for anything else."""
    data = _only_field(message, _CHUNK_TAG)
    return memoryview(pb.Chunk.FromString(message).data) if data is None else data


def upload_data(message: bytes) -> memoryview:
    """Return the data of a serialized `UploadChunk`; raises protobuf's DecodeError for anything else."""
    data = _only_field(message, _UPLOAD_TAG)
    return memoryview(pb.UploadChunk.FromString(message).data) if data is None else data


def _only_field(message: bytes, tag: bytes) -> memoryview | None:
    """Return the bytes of a message's only field, None if it has another form."""
    if message[:1] != tag:
        return None
    length = shift = 0
    for position, byte in enumerate(message[1:6], 1):
        length, shift = length | (byte & 0x7F) << shift, shift + 7
        if byte < 0x80:
            start = position + 1
            return memoryview(message)[start:] if start + length == len(message) else None
    return None


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
