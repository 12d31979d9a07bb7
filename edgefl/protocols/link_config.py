"""Configuration of an MQTT link: broker, identity, subscriptions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from edgefl.errors import ConfigError
from edgefl.protocols.addresses import is_loopback
from edgefl.protocols.tls import Identity

_PORTS = {"mqtt": 1883, "mqtts": 8883}

Will = Callable[[], tuple[str, bytes]]  # topic and payload


@dataclass(frozen=True, kw_only=True, slots=True)
class LinkConfig:
    """Broker, identity and subscriptions of an MQTT link."""

    url: str  # mqtts://host:port, or mqtt://host:port on the loopback interface
    client_id: str  # the device's id, or `cloud`; also the user name if there are no certificates
    identity: Identity | None = None  # None only with mqtt://
    server_name: str = ""  # that the broker's certificate must have; empty = the host of the URL
    subscriptions: Sequence[tuple[str, int]] = ()  # topic filter, QoS
    will: Will | None = None  # called before each connect; sent with QoS 1, retained
    keepalive_s: int = 10

    def __post_init__(self) -> None:
        _, _, secure = parse_url(self.url)
        if secure != (self.identity is not None):
            wanted = "a certificate: enrol first" if secure else "no certificate: use mqtts://"
            raise ConfigError(f"broker {self.url!r} needs {wanted}")
        if self.keepalive_s < 1:
            raise ConfigError(f"keepalive_s={self.keepalive_s} must be at least 1")


def parse_url(url: str) -> tuple[str, int, bool]:
    """Return (host, port, secure) of a broker; raises ConfigError. Plain mqtt:// is for the loopback only."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as cause:
        raise ConfigError(f"broker {url!r} is not mqtts://host:port: {cause}") from cause
    if parts.scheme not in _PORTS or not host or parts.path.strip("/"):
        raise ConfigError(f"broker {url!r} is not mqtts://host:port")
    if parts.scheme == "mqtt" and not is_loopback(host):
        raise ConfigError(f"broker {url!r} is neither TLS nor on this machine; use mqtts://")
    return host, port or _PORTS[parts.scheme], parts.scheme == "mqtts"
