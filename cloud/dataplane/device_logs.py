"""Fetches the end of a device's own log: a command over MQTT, and the device's upload over gRPC.

Only the device that was asked can answer a request, once. A device is asked again only after its answer, and not more
often than once a second; few requests wait at the same time, because each holds one of the threads that answer
operators.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc

from edgefl.errors import DeviceUnavailable, ProtocolError
from edgefl.process.log_tail import MAX_BYTES
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols.messages import DeviceState, LogWanted
from edgefl.protocols.tiers import LogSent

ANSWER_S = 15.0
EVERY_S = 1.0  # per device
MAX_WAITING = 8


class CommandLink(Protocol):
    """Presence of devices, and commands to them."""

    def state(self, device: str) -> DeviceState | None:
        """Return a device's last reported state."""

    def send_command(self, device: str, command: LogWanted) -> None:
        """Send a command; it may be lost."""


class LogReader(Protocol):
    """Takes the logs that devices upload."""

    def receive(self, device: str, request: str, text: bytes, *, cut: bool) -> None:
        """Take a device's answer; raises ProtocolError above the size limit."""


@dataclass(frozen=True, slots=True)
class DeviceLog:
    """The end of a device's log."""

    lines: list[str]
    cut: bool  # whether earlier lines were left out


@dataclass(slots=True)
class _LogRequest:
    id: str
    arrived: threading.Event = field(default_factory=threading.Event)
    log: DeviceLog | None = None


class DeviceLogs:
    """Requests for logs that wait for a device. Methods may be called from any thread."""

    def __init__(
        self, link: CommandLink, answer_s: float = ANSWER_S, clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        self._link, self._answer_s, self._clock, self._wait = link, answer_s, clock, wait
        self._lock = threading.Lock()
        self._waiting: dict[str, _LogRequest] = {}  # device -> its open request
        self._asked_s: dict[str, float] = {}

    def fetch(self, device: str, lines: int, job: str = "") -> DeviceLog:
        """Return the last records of a device's log, about one job if `job` is given.

        Raises DeviceUnavailable at once if the device is offline or its agent too old, and after ANSWER_S if it does
        not answer.
        """
        state = self._link.state(device)
        if state is None or not state.online:
            raise DeviceUnavailable(
                f"device {device} is offline, so its log cannot be fetched; on the device, see its agent.log or journal"
            )
        if LogWanted.kind_name not in state.commands:
            raise DeviceUnavailable(
                f"agent {state.agent_version} of device {device} does not send its log; update the agent"
            )
        request, wait_s = self._enter(device)
        try:
            self._wait(wait_s)
            self._link.send_command(device, LogWanted(request=request.id, lines=lines, job=job))
            request.arrived.wait(self._answer_s)
        finally:
            with self._lock:
                self._waiting.pop(device, None)
        if request.log is None:
            raise DeviceUnavailable(f"device {device} did not send its log within {self._answer_s:g} s; try again")
        return request.log

    def receive(self, device: str, request: str, text: bytes, *, cut: bool) -> None:
        """Take a device's answer; ignores one that nobody waits for. Raises ProtocolError above the size limit."""
        if len(text) > MAX_BYTES:
            raise ProtocolError(f"the log has {len(text)} bytes; at most {MAX_BYTES} are accepted")
        with self._lock:
            waiting = self._waiting.get(device)
            if waiting is None or waiting.id != request or waiting.log is not None:
                return
            waiting.log = DeviceLog(text.decode("utf-8", "replace").splitlines(), cut)
        waiting.arrived.set()

    def take(self, device: str, sent: LogSent) -> None:
        """Take a device's answer through its region, as `receive`."""
        self.receive(device, sent.request, sent.text.encode(), cut=sent.cut)

    def _enter(self, device: str) -> tuple[_LogRequest, float]:
        """Return a new request, and how long it has to wait after the one before it (s)."""
        with self._lock:
            now_s = self._clock()
            self._asked_s = {name: at for name, at in self._asked_s.items() if now_s - at < EVERY_S}
            if device in self._waiting:
                raise DeviceUnavailable(f"the log of device {device} is being fetched; try again in a moment")
            if len(self._waiting) >= MAX_WAITING:
                raise DeviceUnavailable(f"{MAX_WAITING} logs are being fetched; try again later")
            at_s = max(now_s, self._asked_s.get(device, now_s - EVERY_S) + EVERY_S)
            self._asked_s[device] = at_s
            self._waiting[device] = request = _LogRequest(secrets.token_hex(8))
            return request, at_s - now_s


async def receive_log(
    logs: LogReader | None, device: str, report: pb.LogReport, context: grpc.aio.ServicerContext[Any, Any]
) -> None:
    """Take the upload of a device; aborts the call above the size limit."""
    try:
        if logs is not None:
            logs.receive(device, report.request, report.text, cut=report.cut)
    except ProtocolError as error:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
