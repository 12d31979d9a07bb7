"""The options of `edgefl region start`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cloud.broker.child import BUILTIN, EMBEDDED
from edgefl.errors import ConfigError
from edgefl.protocols.addresses import bracketed


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionOptions:
    """The options of `edgefl region start`."""

    home: Path
    host: str = "127.0.0.1"
    address: str = ""  # at which devices reach it; empty = `host`
    grpc_port: int = 9440
    http_port: int = 9480
    mqtt_port: int = 8883
    broker: str = EMBEDDED  # mosquitto as this region's child if installed, otherwise the built-in one; or BUILTIN

    def __post_init__(self) -> None:
        if self.broker not in {EMBEDDED, BUILTIN}:
            raise ConfigError(
                f"--broker={self.broker!r} is invalid; expected {EMBEDDED} or {BUILTIN}: a region runs its own broker"
            )

    @property
    def broker_here(self) -> str:
        """The URL at which this process reaches its broker."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104 - not bound
        return f"mqtts://{bracketed(host)}:{self.mqtt_port}"
