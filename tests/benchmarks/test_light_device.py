"""The packets of a light device, by hand."""

import asyncio

import pytest

from benchmarks.light_device import _read_packet, packet


@pytest.mark.parametrize(
    ("length", "head"),
    [(5, b"\x10\x05"), (127, b"\x10\x7f"), (300, b"\x10\xac\x02"), (16_384, b"\x10\x80\x80\x01")],
)
def test_packets_by_hand(length, head):
    """The remaining length of MQTT 3.1.1, section 2.2.3: seven bits a byte, the lowest first."""
    written = packet(0x10, b"x" * length)
    assert written == head + b"x" * length

    async def read():
        reader = asyncio.StreamReader()
        reader.feed_data(written)
        return await _read_packet(reader)

    assert asyncio.run(read()) == (0x10, b"x" * length)
