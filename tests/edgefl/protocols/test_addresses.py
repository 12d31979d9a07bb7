"""Which hosts are this machine, and how they stand in a URL."""

from __future__ import annotations

import pytest

from edgefl.protocols.addresses import bracketed, is_loopback


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.9.9.9", "::1"])
def test_this_machine(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["", "::", "10.0.0.1", "localhost.example.org", "127.0.0.1.example.org"])
def test_any_other(host: str) -> None:
    assert not is_loopback(host)


def test_an_ipv6_address_has_brackets() -> None:
    assert [bracketed(host) for host in ("::1", "10.0.0.1", "a.b")] == ["[::1]", "10.0.0.1", "a.b"]
