"""The agent's link to the cloud: MQTT for small messages, gRPC for the rest; both reconnect by themselves.

A lost MQTT message costs latency, never correctness: the agent calls `Next` over gRPC after each reconnect of either
side, and at intervals. So it works without a broker, and waits without a cloud.
Presence: each connection to the broker has a session number, higher than all before it, in its first message and in
its will. So the cloud can ignore a will of an old connection that arrives late.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import grpc
import psutil

from edge_agent.link.channel import CloudChannel
from edge_agent.link.chooser import ParentChooser
from edge_agent.link.profile import Profile, load_profile, save_profile, with_broker
from edge_agent.link.renewal import Renewal
from edge_agent.resources import measure
from edgefl.errors import CloudUnreachable, ConfigError, HomeError, ProtocolError
from edgefl.logs import event
from edgefl.process.home import replace_file
from edgefl.process.version import __version__
from edgefl.protocols import messages, topics
from edgefl.protocols.assignments import unpack
from edgefl.protocols.backoff import Backoff
from edgefl.protocols.messages import (
    Assignment,
    Command,
    DeviceState,
    JobMessage,
    LogWanted,
    NewParents,
    RolloutNote,
    Signed,
)
from edgefl.protocols.mqtt import LinkConfig, MqttLink, parse_url
from edgefl.protocols.tls import Identity

ASK_EVERY_S = 30.0  # interval of `Next`, in case MQTT messages are lost
RETRY_S = 2.0  # after `Next` failed; longer if the cloud is full
TELEMETRY_EVERY_S = 30.0
MAX_REASON_CHARS = 200
MAX_SESSION = 2**62  # a damaged file must not cause a number that a message cannot hold

_log = logging.getLogger(__name__)


class CloudLinkCallbacks(Protocol):
    """Callbacks of the link. Called in the event loop."""

    def on_job(self, message: JobMessage) -> None:
        """Handle a message from topic down/<device>/job."""

    def on_desired(self, signed: Signed) -> None:
        """Handle a release that this device should serve; its signature is not verified yet."""

    def on_command(self, command: LogWanted) -> None:
        """Handle a command from topic down/<device>/command."""

    def before_next(self) -> tuple[list[str], Callable[[list[Assignment], list[str]], None]]:
        """Called before `Next`: return the jobs with data here, and a callback for assignments and ended jobs."""


class CloudLink:
    """The agent's connections to broker and cloud; `run` opens and closes them."""

    def __init__(
        self, home: Path, chooser: ParentChooser, channel: CloudChannel, callbacks: CloudLinkCallbacks,
        on_reachable: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        profile = chooser.current
        self._home, self._profile, self._channel, self._callbacks = home, profile, channel, callbacks
        self._enrolled, self._chooser = load_profile(home), chooser
        self.on_parent: Callable[[Profile], None] = lambda _profile: None  # called when another parent is in use
        self._on_reachable = on_reachable  # called each time the cloud becomes reachable
        self._ask = asyncio.Event()
        self._backoff = Backoff(RETRY_S, RETRY_S, profile.device)
        self._is_full = False  # the cloud, by its last answer
        self.on_change: Callable[[], None] = lambda: None  # called when the connection to the broker changes
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._session = _Session(home / "session")
        self._serving: tuple[Mapping[str, int], str] = ({}, "")
        self.refusals: Mapping[str, str] = {}  # of the device's own policy
        self.models: Callable[[], Mapping[str, messages.ModelReport]] = dict  # for telemetry
        self._last_error = ""  # of `Next`; logged as a warning when it changes
        self._mqtt = self._new_mqtt()
        self._renewal = Renewal(home, profile.device, channel, lambda: self._mqtt.reconnect("the certificate is new"))

    async def run(self) -> None:
        """Keep the link up until cancelled; then publish that the device is offline."""
        self._mqtt.start()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._channel.watch(self._reached), name="cloud-watch")
                tasks.create_task(self._ask_next(), name="next")
                tasks.create_task(self._send_telemetry(), name="telemetry")
                await self._failure  # a failure of the MQTT link stops the agent
        finally:
            self._publish("state", self._state(online=False), retain=True)
            await self._mqtt.close()
            await self._channel.close()

    @property
    def broker_fault(self) -> str:
        """Why there is no connection to the broker; empty if there is one."""
        return self._mqtt.reason

    def serve(self, models: Mapping[str, int], url: str) -> None:
        """Publish which model versions this device serves, and at which URL."""
        self._serving = (dict(models), url)
        if self._mqtt.is_up:
            self._publish("state", self._state(online=True), retain=True)

    def refuse(self, refusals: Mapping[str, str]) -> None:
        """Publish what the device's own policy refuses now."""
        self.refusals = refusals
        if self._mqtt.is_up:
            self._publish("state", self._state(online=True), retain=True)

    def report(self, note: RolloutNote) -> None:
        """Report the progress of a release."""
        self._publish("rollout", note)

    def ask(self) -> None:
        """Call `Next` soon."""
        self._ask.set()

    def note_idle(self) -> None:
        """The device may have become idle: perhaps it goes back to an earlier parent now."""
        if self._chooser.waits_for_idle:
            self._ask.set()

    def _reached(self) -> None:
        self._ask.set()
        self._on_reachable()

    async def _ask_next(self) -> None:
        wait_s = ASK_EVERY_S
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._ask.wait()
            self._ask.clear()
            if await self._next():
                self._backoff.reset()
                wait_s = ASK_EVERY_S
            else:
                wait_s = self._backoff.next_s(full=self._is_full)
            wait_s = min(wait_s, self._chooser.look_s)
            if (other := await self._chooser.choose()) is not None:
                await self._change_parent(other)

    async def _next(self) -> bool:
        self._is_full = False
        try:
            holding, take = self._callbacks.before_next()
            reply = await self._channel.next(__version__, holding, self._chooser.look_s)
            self._chooser.reached()
            if reply.parents:
                self._chooser.take(reply.parents)
            take(unpack(reply), list(reply.ended))
            for signed in reply.desired:
                self._callbacks.on_desired(messages.decode(Signed, signed))
            await self._follow_broker(reply.broker)
            if reply.renew and await self._renewal.renew():
                self._ask.set()  # use the new certificate once, so that the cloud sees it
        except grpc.aio.AioRpcError as error:
            self._chooser.failed(error)
            self._is_full = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            last, self._last_error = self._last_error, error.details() or ""
            is_news = error.code() is not grpc.StatusCode.UNAVAILABLE and self._last_error != last
            level = logging.WARNING if is_news else logging.DEBUG
            event(_log, level, "next.failed", code=error.code().name, reason=error.details())
            return False
        except (ProtocolError, ConfigError) as error:
            event(_log, logging.WARNING, "next.unreadable", reason=error)
            return True
        except (HomeError, OSError) as error:  # temporary: a full disk, a locked database
            event(_log, logging.ERROR, "next.put_off", reason=error)
            return False
        self._last_error = ""
        with suppress(OSError):  # full disk: only `edgefl agent status` shows an older contact then
            (self._home / "contact").touch()
        return True

    async def _follow_broker(self, url: str) -> None:
        """Switch to the broker that the cloud names, if it has changed."""
        profile = with_broker(self._profile, url)
        if profile == self._profile:
            return
        parse_url(profile.broker)  # raises before anything changes
        event(_log, logging.INFO, "broker.moved", broker=profile.broker)
        if profile.grpc == self._enrolled.grpc:  # the home has the addresses of the enrolment alone
            try:
                save_profile(self._home, profile)
            except OSError as error:  # full disk: each `Next` names the broker again
                event(_log, logging.ERROR, "broker.not_saved", reason=error)
        await self._change_broker(profile)

    async def _change_parent(self, profile: Profile) -> None:
        """Leave the parent for another one: gRPC, MQTT and HTTPS. What is not sent yet is sent there."""
        self._publish("state", self._state(online=False), retain=True)
        await self._channel.switch(profile)
        self.on_parent(profile)
        await self._change_broker(profile)
        self._ask.set()

    async def _change_broker(self, profile: Profile) -> None:
        self._profile, former = profile, self._mqtt
        await former.close()
        self._mqtt = self._new_mqtt()
        for topic, payload, qos, retain in former.unsent():
            if topic != topics.up(profile.device, "state"):  # that is of the former connection
                self._mqtt.publish(topic, payload, qos=qos, retain=retain)
        self._mqtt.start()

    async def _send_telemetry(self) -> None:
        while True:
            if self._mqtt.is_up:
                self._publish_telemetry()
            await asyncio.sleep(TELEMETRY_EVERY_S)

    def _publish_telemetry(self) -> None:
        try:
            self._publish("telemetry", dataclasses.replace(measure(self._home), models=self.models()), qos=0)
        except (ProtocolError, OSError, psutil.Error) as error:  # unusable or missing values of the system
            event(_log, logging.WARNING, "telemetry.not_measured", reason=error)

    def _publish(self, kind: str, message: object, *, retain: bool = False, qos: int = 1) -> None:
        try:
            self._mqtt.publish(topics.up(self._profile.device, kind), messages.encode(message), retain=retain, qos=qos)
        except (CloudUnreachable, ProtocolError) as error:
            event(_log, logging.WARNING, "mqtt.not_sent", kind=kind, reason=error)

    def _state(self, *, online: bool) -> DeviceState:
        models, url = self._serving
        return DeviceState(
            session=self._session.number,
            online=online,
            agent_version=__version__,
            models=models,
            tags=self._profile.tags,
            serving_url=url,
            commands=list(messages.COMMANDS),
            refuses={code: why[:MAX_REASON_CHARS] for code, why in self.refusals.items()},
        )

    def _new_mqtt(self) -> MqttLink:
        device, profile = self._profile.device, self._profile
        secure = profile.broker.startswith("mqtts://")
        config = LinkConfig(
            url=profile.broker,
            client_id=device,
            identity=Identity.in_folder(self._home) if secure else None,
            server_name=profile.server_name,
            subscriptions=[(topics.down(device, kind), 1) for kind in ("job", "desired", "command")],
            will=self._will,
        )
        return MqttLink(
            config, on_message=self._on_message, on_connect=self._on_connect, on_failure=self._on_failure,
            on_disconnect=self._on_disconnect,
        )  # fmt: skip

    # The methods below are called by the MQTT link.

    def _will(self) -> tuple[str, bytes]:  # called in a thread, because it writes a file
        self._session.advance()
        return topics.up(self._profile.device, "state"), messages.encode(self._state(online=False))

    def _on_connect(self) -> None:
        self._publish("state", self._state(online=True), retain=True)
        self._publish_telemetry()
        self._ask.set()
        self.on_change()

    def _on_disconnect(self) -> None:
        if self._chooser.look_s < math.inf:
            self._ask.set()  # perhaps the parent is lost: then the device looks for another soon
        self.on_change()

    def _take_command(self, command: Command) -> None:
        if isinstance(command, NewParents):
            self._chooser.take(messages.encode(command.signed))
            self._ask.set()
        else:
            self._callbacks.on_command(command)

    def _on_failure(self, failure: BaseException) -> None:
        if not self._failure.done():
            self._failure.set_exception(failure)

    def _on_message(self, topic: str, payload: bytes) -> None:
        if topic.endswith("/job"):
            self._callbacks.on_job(messages.decode_job(payload))
        elif topic.endswith("/command"):
            self._take_command(messages.decode_command(payload))
        elif payload:  # an empty payload only clears the retained message
            self._callbacks.on_desired(messages.decode(Signed, payload))


class _Session:
    """A number that only increases, also after restarts and when the clock is set back."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self.number = int(path.read_text(encoding="ascii"))
        except (FileNotFoundError, ValueError):
            self.number = 0
        if not 0 <= self.number < MAX_SESSION:
            self.number = 0

    def advance(self) -> None:
        self.number = max(time.time_ns() // 1_000_000, self.number + 1)
        try:
            replace_file(self._path, str(self.number).encode())
        except OSError as error:  # full disk: after a restart, the number still follows the clock
            event(_log, logging.ERROR, "session.not_saved", reason=error)
