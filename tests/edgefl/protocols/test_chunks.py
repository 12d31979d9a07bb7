import pytest
from google.protobuf.message import DecodeError

from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols.chunks import chunk_data, encode_chunk, encode_upload, upload_data

SIZES = (0, 1, 127, 128, 16_383, 16_384, 4 << 20)


@pytest.mark.parametrize("size", SIZES)
def test_our_form_is_protobufs_form(size):
    data = b"x" * size
    assert pb.Chunk.FromString(encode_chunk(data)).data == data
    assert pb.UploadChunk.FromString(encode_upload(memoryview(data))).data == data
    assert chunk_data(pb.Chunk(data=data).SerializeToString()) == data
    assert upload_data(pb.UploadChunk(data=data).SerializeToString()) == data


def test_our_form_is_read_without_a_copy():
    message = encode_chunk(b"abc")
    assert chunk_data(message).obj is message


def test_an_unusual_but_valid_form_is_read():
    twice = encode_chunk(b"first") + encode_chunk(b"last")  # protobuf: the last one counts
    assert chunk_data(twice) == b"last"
    long_varint = b"\x0a\x83\x80\x00abc"
    assert chunk_data(long_varint) == b"abc"


def test_a_header_is_no_data():
    assert upload_data(pb.UploadChunk(header=pb.UploadHeader(size=3)).SerializeToString()) == b""


@pytest.mark.parametrize("message", [b"\x0a", b"\x0a\x05ab", b"\x0a\xff\xff\xff\xff\xff\xff", b"\x12\x80"])
def test_bytes_that_are_no_message_are_refused(message):
    with pytest.raises(DecodeError):
        chunk_data(message)
