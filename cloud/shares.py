"""Divides the cloud's file descriptors between its ports when it starts, so that no port can use up another's.

    a quarter (512 at most)   the database, the spool, blobs, the process itself
    an eighth (1000 at most)  HTTPS: operators, enrolment
    the rest                  devices, at the gRPC port and, with the built-in broker, at the MQTT port

A device port reserves some places for connections that are not authenticated yet; the others are *seats* for
enrolled devices. A device that gets no seat receives an error. Invariant: the sum of the shares is within the limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from edgefl.errors import HostError
from edgefl.protocols.ports.connections import MAX_LEAVING, ConnectionLimits

LEAST = 256  # descriptors; a cloud needs at least this many
MAX_FILES, MAX_HTTP, MAX_WAITING = 512, 1000, 256
WAITING_S = 20.0  # time limit to authenticate: TLS, and a first call or CONNECT
FILES_OF_A_TRANSFER = 4  # two transfer limiters, and files that are opened twice


@dataclass(frozen=True, kw_only=True, slots=True)
class PortShare:
    """The limits of one port for devices."""

    seats: int  # connections of enrolled devices
    waiting: int  # connections that are not authenticated yet

    def limits(self) -> ConnectionLimits:
        return ConnectionLimits(max_open=self.seats + self.waiting, max_waiting=self.waiting, waiting_s=WAITING_S)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shares:
    """How a limit of open descriptors is divided."""

    limit: int
    files: int
    http: int
    devices: PortShare  # each: of the gRPC port, and of the built-in broker's

    @classmethod
    def of(cls, limit: int, *, builtin_broker: bool) -> Self:
        """Divide a limit; raises HostError if it is too low for a cloud."""
        if limit < LEAST:
            raise HostError(
                f"this process may open {limit} files and connections; a cloud needs {LEAST}, and two more for each "
                "device. Raise the limit: `ulimit -n`, or LimitNOFILE= in its unit"
            )
        files, http = min(MAX_FILES, limit // 4), min(MAX_HTTP, limit // 8)
        num_ports = 2 if builtin_broker else 1
        each = (limit - files - http) // num_ports - MAX_LEAVING
        waiting = min(MAX_WAITING, each // 4)
        return cls(limit=limit, files=files, http=http, devices=PortShare(seats=each - waiting, waiting=waiting))

    @property
    def transfers(self) -> int:
        """How many uploads, and how many downloads, may run at a time."""
        return max(4, self.files // FILES_OF_A_TRANSFER)

    def full(self) -> str:
        """The error for a device that gets no seat."""
        return (
            f"the cloud holds the connections of {self.devices.seats} devices, the most that its limit of "
            f"{self.limit} open files allows; raise the limit (LimitNOFILE= in its unit, `ulimit -n`). This device "
            "retries by itself"
        )
