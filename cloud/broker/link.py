"""The cloud's side of the control plane: which devices are online, their messages, and small messages to them.

Invariants: of two states of a device the one with the higher session is used, and within a session `offline` is the
last (a will may arrive after the device's next connect); a malformed message changes nothing and is logged with its
device and reason; messages of devices that are not enrolled are rejected. Without a connection to the broker all
devices count as offline; retained states and new ones then show which are online.

The event loop only queues messages; a thread (`cloud.broker.inbox`) processes them in order, and retries while the
database or the disk is unavailable. So a locked database delays no keep-alive.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from cloud.broker.inbox import Inbox
from edgefl.errors import CloudUnreachable, ProtocolError
from edgefl.logs import event
from edgefl.protocols import topics
from edgefl.protocols.messages import (
    Command,
    DeviceState,
    JobMessage,
    NewParents,
    RolloutNote,
    Signed,
    Telemetry,
    decode,
    encode,
)
from edgefl.protocols.mqtt import LinkConfig, MqttLink
from edgefl.protocols.tls import CLOUD_NAME, Identity

_KINDS: Mapping[str, type[Any]] = {"state": DeviceState, "rollout": RolloutNote, "telemetry": Telemetry}

_log = logging.getLogger(__name__)


def _ignore(*_: object) -> None:
    pass


def _always(_device: str) -> bool:
    return True


class RegionLink(Protocol):
    """The regions below, through which devices are reached, too."""

    def send_job(self, region: str, device: str, message: JobMessage) -> None:
        """Pass a job message for a device to its region."""

    def send_command(self, region: str, device: str, command: Command) -> None:
        """Pass a command for a device to its region."""

    def send_desired(self, device: str, signed: Signed) -> None:
        """Pass the release that a device should serve to all regions to which it may connect."""

    def send_parents(self, device: str, signed: Signed) -> None:
        """Pass a device's list of parents to the regions in it."""

    def moved(self, device: str, region: str) -> None:
        """Note that a device is reached through another region now; empty = directly."""

    def close_round(self, job: str, number: int) -> None:
        """Ask no region any more for its part in a round."""

    def withdraw(self, device: str, job: str, number: int) -> None:
        """Ask no region any more for a device's answer in a round."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceLinkCallbacks:
    """Callbacks of the link. All but `on_failure` are called in the inbox's thread, and must return quickly."""

    on_failure: Callable[[BaseException], None]  # the link has failed for good
    on_state: Callable[[str, DeviceState], None] = _ignore  # also when the connection to the broker is lost
    on_note: Callable[[str, RolloutNote], None] = _ignore
    on_telemetry: Callable[[str, Telemetry], None] = _ignore  # of a device that is online
    # Instead of `on_state`, for a device that did not say that it is offline: its region, or the broker, was lost.
    on_lost: Callable[[str, DeviceState], None] | None = None
    is_known: Callable[[str], bool] = _always  # whether a device is enrolled


class DeviceLink:
    """Presence and messages through any broker. Methods may be called from any thread, except `start`."""

    def __init__(
        self,
        url: str,
        identity: Identity | None,
        callbacks: DeviceLinkCallbacks,
        name: str = CLOUD_NAME,
        server_name: str = "",
    ) -> None:
        self._callbacks = callbacks
        self._changed = threading.Condition()
        self._states: dict[str, DeviceState] = {}
        self._telemetry: dict[str, Telemetry] = {}  # of devices that are online
        config = LinkConfig(
            url=url,
            client_id=name,
            identity=identity,
            server_name=server_name,
            subscriptions=[(topics.EVERY_UP, 1)],
            keepalive_s=10,
        )
        self._lost: set[str] = set()  # devices whose region was lost: they may be about to connect elsewhere
        self._encoded: tuple[JobMessage | None, bytes] = None, b""  # the last message of a job
        self._via: dict[str, str] = {}  # device -> the region through which it is reached; missing = directly
        self.children: RegionLink | None = None  # the regions below, if there can be any
        self._inbox: Inbox[tuple[str, bytes, str] | None] = Inbox("mqtt-inbox", self._process)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._link = MqttLink(
            config,
            on_message=lambda topic, payload: self._inbox.put(topic, (topic, payload, "")),
            on_disconnect=lambda: self._inbox.put("", None),
            on_failure=callbacks.on_failure,
        )

    def start(self) -> None:
        """Start connecting, in the running event loop; returns at once."""
        self._loop = asyncio.get_running_loop()
        self._inbox.start()
        self._link.start()

    @property
    def reason(self) -> str:
        """Why there is no connection to the broker; empty if there is one."""
        return self._link.reason

    @property
    def held_up(self) -> str:
        """Why received messages are delayed; empty if they are not."""
        return self._inbox.reason

    def close(self) -> None:
        """Send the queued messages and disconnect. Do not call it in the event loop."""
        if self._loop is not None and self._loop.is_running():
            asyncio.run_coroutine_threadsafe(self._link.close(), self._loop).result()
        self._inbox.close()

    def online(self) -> frozenset[str]:
        """Return the devices that are online."""
        with self._changed:
            return frozenset(name for name, state in self._states.items() if state.online)

    def offline(self) -> frozenset[str]:
        """Return the devices that have reported a state and are not online; not those whose region was lost."""
        with self._changed:
            return frozenset(name for name, state in self._states.items() if not state.online) - self._lost

    def states(self) -> Mapping[str, DeviceState]:
        """Return the last state of each device since the cloud's start."""
        with self._changed:
            return dict(self._states)

    def state(self, device: str) -> DeviceState | None:
        """Return a device's last state since the cloud's start, if any."""
        with self._changed:
            return self._states.get(device)

    def telemetry(self, device: str) -> Telemetry | None:
        """Return the latest telemetry of an online device."""
        with self._changed:
            return self._telemetry.get(device)

    def wait_until(self, predicate: Callable[[], bool], timeout_s: float) -> bool:
        """Wait until the predicate, evaluated at each change of presence, is true; False at the timeout."""
        with self._changed:
            return self._changed.wait_for(predicate, max(0.0, timeout_s))

    def wake(self) -> None:
        """Make all threads in `wait_until` evaluate their predicates again."""
        with self._changed:
            self._changed.notify_all()

    def hear(self, region: str, device: str, kind: str, payload: bytes) -> None:
        """Take what a device said to the region through which it is connected; empty = it is no longer there."""
        topic = topics.up(device, kind)
        self._inbox.put(f"{region} {topic}", (topic, payload, region))

    def via(self, device: str) -> str:
        """Return the region through which a device is reached; empty = directly."""
        with self._changed:
            return self._via.get(device, "")

    def close_round(self, job: str, number: int) -> None:
        """Ask no region any more for its part in a round."""
        if self.children is not None:
            self.children.close_round(job, number)

    def withdraw(self, device: str, job: str, number: int) -> None:
        """Ask no region any more for a device's answer in a round: it is here."""
        if self.children is not None:
            self.children.withdraw(device, job, number)

    def send_job(self, device: str, message: JobMessage) -> None:
        """Send a job message; a device that misses it calls `Next` when it reconnects."""
        if self.children is not None and (region := self.via(device)):
            self.children.send_job(region, device, message)
            return
        former, data = self._encoded
        if former is not message:  # all devices of a round get the same
            data = encode(message)
            self._encoded = message, data
        self._send(topics.down(device, "job"), data)

    def send_command(self, device: str, command: Command) -> None:
        """Send a command; the caller notices by itself if it is lost."""
        if self.children is not None and (region := self.via(device)):
            self.children.send_command(region, device, command)
            return
        self._send(topics.down(device, "command"), encode(command))

    def send_desired(self, device: str, signed: Signed) -> None:
        """Send the release that a device should serve; the broker retains it."""
        if self.children is not None:
            self.children.send_desired(device, signed)
        self._send(topics.down(device, "desired"), encode(signed), retain=True)

    def send_parents(self, device: str, signed: Signed) -> None:
        """Send where a device may connect; one that misses it, or knows no such command, calls `Next` some time."""
        if self.children is not None:
            self.children.send_parents(device, signed)
        state = self.state(device)
        if state is not None and NewParents.kind_name in state.commands and not self.via(device):
            self.send_command(device, NewParents(signed=signed))

    def forget(self, device: str) -> None:
        """Clear a device's retained messages and its presence."""
        for topic in (topics.up(device, "state"), topics.down(device, "desired")):
            self._send(topic, b"", retain=True)
        with self._changed:
            self._states.pop(device, None)
            self._telemetry.pop(device, None)
            self._via.pop(device, None)
            self._lost.discard(device)
            self._changed.notify_all()

    def _send(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        try:
            self._link.publish(topic, payload, retain=retain)
        except CloudUnreachable as fault:  # costs latency only: the device will call `Next`
            event(_log, logging.WARNING, "mqtt.not_sent", topic=topic, reason=fault)

    # In the inbox's thread.

    def _process(self, item: tuple[str, bytes, str] | None) -> None:
        """Process a message; None means that the connection to the broker was lost."""
        if item is None:
            self._note_broker_lost()
        else:
            self._receive(*item)

    def _receive(self, topic: str, payload: bytes, region: str) -> None:
        device, kind = topics.parse_up(topic)
        if not payload and region:
            if kind == "state":
                self._note_region_lost(region, device)
            return
        if not payload and kind == "state":
            return  # our own `forget`
        try:
            self._dispatch(device, kind, payload, region)
        except ProtocolError as fault:
            event(_log, logging.WARNING, "device.bad_message", device=device, kind=kind, reason=fault)

    def _dispatch(self, device: str, kind: str, payload: bytes, region: str) -> None:
        if not self._callbacks.is_known(device):
            raise ProtocolError("the device is not enrolled")
        message = decode(_KINDS[kind], payload)
        if isinstance(message, DeviceState):
            self._note_state(device, message, region)
        elif isinstance(message, RolloutNote):
            self._callbacks.on_note(device, message)
        else:
            self._note_telemetry(device, message)

    def _note_state(self, device: str, state: DeviceState, region: str) -> None:
        with self._changed:
            held, former = self._states.get(device), self._via.get(device, "")
            if held is not None and _order(state) < _order(held):
                event(_log, logging.DEBUG, "device.old_state", device=device, session=state.session, held=held.session)
                return
            self._states[device] = state
            self._lost.discard(device)
            if region:
                self._via[device] = region
            else:
                self._via.pop(device, None)
            if not state.online:
                self._telemetry.pop(device, None)
            self._changed.notify_all()
        if held is None or held.online != state.online:
            event(_log, logging.INFO, "device.online" if state.online else "device.offline", device=device,
                  region=region or "-")  # fmt: skip
        if self.children is not None and state.online and (former != region or held is None or not held.online):
            self.children.moved(device, region)
        self._callbacks.on_state(device, state)

    def _note_telemetry(self, device: str, telemetry: Telemetry) -> None:
        with self._changed:
            if (state := self._states.get(device)) is not None and state.online:
                if device not in self._telemetry:
                    self._changed.notify_all()  # a choice of devices may wait for it
                self._telemetry[device] = telemetry
        if state is not None and state.online:
            self._callbacks.on_telemetry(device, telemetry)

    def _note_region_lost(self, region: str, device: str) -> None:
        """A device is not reached through this region any more."""
        with self._changed:
            held = self._states.get(device)
            if held is None or self._via.get(device) != region:
                return  # it is elsewhere
            state = self._states[device] = dataclasses.replace(held, online=False, session=0)
            if held.online:
                self._lost.add(device)
            self._telemetry.pop(device, None)
            self._changed.notify_all()
        (self._callbacks.on_lost or self._callbacks.on_state)(device, state)

    def _note_broker_lost(self) -> None:
        with self._changed:
            here = {name: one for name, one in self._states.items() if name not in self._via}
            lost = {name: dataclasses.replace(one, online=False, session=0) for name, one in here.items()}
            self._states.update(lost)
            for name in lost:
                self._telemetry.pop(name, None)
            self._changed.notify_all()
        for device, state in lost.items():
            (self._callbacks.on_lost or self._callbacks.on_state)(device, state)


def _order(state: DeviceState) -> tuple[int, bool]:
    return state.session, not state.online
