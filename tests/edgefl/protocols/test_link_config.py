"""A broker's URL by hand; TLS and certificates go together."""

from __future__ import annotations

import pytest

from edgefl.errors import ConfigError
from edgefl.protocols.link_config import LinkConfig, parse_url


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("mqtts://broker.example:1234", ("broker.example", 1234, True)),
        ("mqtts://broker.example", ("broker.example", 8883, True)),
        ("mqtt://127.0.0.1:1", ("127.0.0.1", 1, False)),
        ("mqtt://localhost", ("localhost", 1883, False)),
        ("mqtts://[::1]:5", ("::1", 5, True)),
    ],
)
def test_a_broker_url_by_hand(url: str, parts: tuple[str, int, bool]) -> None:
    assert parse_url(url) == parts


@pytest.mark.parametrize(
    "url", ["broker:8883", "https://broker:8883", "mqtts://", "mqtts://b:port", "mqtts://b:99999", "mqtts://b/x",
            "mqtt://broker.example:1883", "mqtt://0.0.0.0:1883"],
)  # fmt: skip
def test_another_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="broker"):
        parse_url(url)


def test_tls_and_certificate_go_together(fleet_ca) -> None:
    with pytest.raises(ConfigError, match="enrol"):
        LinkConfig(url="mqtts://localhost", client_id="cam-1")
    with pytest.raises(ConfigError, match="mqtts"):
        LinkConfig(url="mqtt://localhost", client_id="cam-1", identity=fleet_ca.device("cam-1"))
    with pytest.raises(ConfigError, match="keepalive"):
        LinkConfig(url="mqtt://localhost", client_id="cam-1", keepalive_s=0)
