"""Messages between the serving and the generation process."""

from __future__ import annotations

import asyncio
import os
import socket

import pytest

from edge_agent.generation.wire import (
    MAX_BODY_BYTES,
    ForwardedRequest,
    ResponseHead,
    is_own,
    line,
    listen_privately,
    parse_forwarded,
    parse_head,
    piece,
    read_piece,
)
from edgefl.errors import ProtocolError


def test_lines_are_read_as_they_were_written() -> None:
    request = ForwardedRequest(method="POST", path="/v1/models", length=3)
    assert parse_forwarded(line(request)) == request
    assert parse_head(line(ResponseHead(status=200, type="x"))) == ResponseHead(status=200, type="x")


@pytest.mark.parametrize("text", [b"", b"{}\n", b"[1]\n", b'{"method":"a","path":"b","length":"c"}\n'])
def test_other_lines_are_refused(text) -> None:
    with pytest.raises(ProtocolError):
        parse_forwarded(text)
    with pytest.raises(ProtocolError):
        parse_head(text)


def test_a_body_is_bounded() -> None:
    with pytest.raises(ProtocolError, match="has a body of"):
        parse_forwarded(line(ForwardedRequest(method="POST", path="/", length=MAX_BODY_BYTES + 1)))


def test_pieces_end_with_an_empty_one_and_a_cut_is_noticed() -> None:
    async def run():
        reader = asyncio.StreamReader()
        reader.feed_data(piece(b"ab") + piece(b"") + piece(b"xyz")[:5])
        reader.feed_eof()
        assert [await read_piece(reader), await read_piece(reader)] == [b"ab", b""]
        with pytest.raises(asyncio.IncompleteReadError):
            await read_piece(reader)
        huge = asyncio.StreamReader()
        huge.feed_data(b"\xff" * 4)
        with pytest.raises(ProtocolError, match="has a piece of"):
            await read_piece(huge)

    asyncio.run(run())


def test_only_the_own_user_is_served(monkeypatch) -> None:
    listener, address = listen_privately()
    with listener, socket.socket(socket.AF_UNIX) as client:
        assert address.startswith("\0")
        client.connect(address.encode("latin-1"))
        accepted, _ = listener.accept()
        with accepted:
            assert is_own(accepted)
            monkeypatch.setattr(os, "geteuid", lambda: 12_345)
            assert is_own(accepted) is (os.getuid() == 0)  # the system's own user may, too
