"""A Grid whose nodes are the devices of a fleet: a relay of the cloud carries messages; replies arrive one by one.

`push_messages` sends at once and `pull_messages` returns the replies so far, which suits asynchronous apps; the
replies of `send_and_receive` arrive while they are iterated. A lost device gets an Error as its reply, a late
device gets no reply, both as in Flower.
Invariants: the cloud deletes a message's content once no caller waits for its reply; a pushed message runs before
any later message to the same device, in the order of their numbers, and before the run ends.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import Message

from edgefl.errors import ConfigError, ProtocolError
from edgefl.flower.apps.app import RunConfigValue
from edgefl.flower.fleet import wire
from edgefl.flower.grid import Replies, RunGrid, checked_messages
from edgefl.flower.internals import ErrorCode, RunNotRunningException, error_reply, give_id, without_content
from edgefl.flower.tracker import RoundTracker
from edgefl.operator.relay import Relay

Json = dict[str, Any]

LOOK_S = 1.0  # interval of checks whether a pause of the cloud is over


@dataclass(frozen=True, slots=True)
class _Sent:
    """A message that was sent: the order for the relay, and the request that its reply is built from."""

    order: Json  # number, device, envelope, content, within_s
    request: Message  # without its content


class _Timeout:
    """The timeout for replies. As in the cloud, it is paused while the cloud cannot store replies."""

    def __init__(self, within_s: float, relay: Relay, clock: Callable[[], float]) -> None:
        self._end_s, self._relay, self._clock = clock() + within_s, relay, clock
        self._before_s = relay.told_paused_s
        self.next_s = self._end_s  # when to ask the cloud next

    def is_over(self) -> bool:
        """Whether the timeout is over; asks the cloud whether it has paused in the meantime."""
        paused_s, is_paused = self._relay.paused_s()
        # A restarted cloud counts from 0 again.
        end_s = self._end_s + (paused_s - self._before_s if paused_s >= self._before_s else paused_s)
        self.next_s = max(end_s, self._clock() + LOOK_S) if is_paused else end_s
        return self.next_s <= self._clock()


class FleetDevices:
    """The devices of a fleet as nodes."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._names: dict[int, str] = {}

    def online(self) -> list[int]:
        """Return the node ids of the devices that are online."""
        names = {wire.node_id(name): name for name in self._relay.devices()}
        self._names.update(names)
        return list(names)

    def name(self, node_id: int) -> str:
        """Return a device's name; raises ConfigError if there is no such node."""
        if node_id not in self._names:
            self.online()
        if node_id not in self._names:
            raise ConfigError(f"there is no node {node_id} among the devices that are online")
        return self._names[node_id]

    def positions(self) -> Mapping[str, int]:
        """Return a number for each device seen so far."""
        return {name: position for position, name in enumerate(sorted(self._names.values()))}


class FleetGrid(RunGrid):
    """Carries messages between a ServerApp and the devices of one relay."""

    def __init__(
        self,
        run_id: int,
        relay: Relay,
        devices: FleetDevices,
        run_config: Mapping[str, RunConfigValue],
        tracker: RoundTracker,
    ) -> None:
        super().__init__(run_id)
        self._relay, self._devices, self._run_config, self._tracker = relay, devices, dict(run_config), tracker
        self._numbers = itertools.count(1)
        self._sending = threading.Lock()  # numbers must reach the cloud in ascending order
        self._pushed: dict[str, _Sent] = {}  # without a reply yet, by message id
        self._come: dict[str, Message] = {}  # their replies that were not pulled yet
        self._closed = False

    def get_node_ids(self) -> Iterable[int]:
        if self._closed or self._relay.fault is not None:  # a thread of the legacy server ends on this
            raise RunNotRunningException
        return self._devices.online()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages, and return at once."""
        with self.boundary:
            sent = self._send(messages, None)
            self._pushed |= {one.request.metadata.message_id: one for one in sent}
            return [one.request.metadata.message_id for one in sent]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies so far to these messages; each is returned once."""
        with self.boundary:
            wanted = list(dict.fromkeys(message_ids))
            self._take_in([self._pushed[key] for key in wanted if key in self._pushed])
            return [self._come.pop(key) for key in wanted if key in self._come]

    def _take_in(self, sent: Collection[_Sent]) -> None:
        """Store the replies so far to these messages for `pull_messages`."""
        for reply in self._arriving(sent, None):
            key = reply.metadata.reply_to_message_id
            self._pushed.pop(key)
            self._come[key] = reply

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Replies:
        """Send messages; the replies arrive as they are iterated, until the timeout (seconds)."""
        if timeout is not None and timeout <= 0:  # the caller does not wait for replies
            self.push_messages(messages)
            return Replies(iter(()))
        with self.boundary:
            sent = self._send(messages, timeout)
        replies = Replies(self._arriving(sent, self._timeout(sent)), self.boundary)
        if len(sent) <= 1:
            len(replies)  # the legacy server sends one message at a time, from many threads
        return replies

    def finish(self) -> None:
        """Wait for the replies to messages that were never pulled, until their timeouts."""
        with self.boundary:
            left, self._pushed = list(self._pushed.values()), {}
            for _ in self._arriving(left, self._timeout(left)):
                pass

    def close(self) -> None:
        """End the run: threads of the legacy server may end."""
        self._closed = True

    def _send(self, messages: Iterable[Message], timeout: float | None) -> list[_Sent]:
        messages = checked_messages(messages)
        held: dict[int, tuple[str, object]] = {}  # by id() of the content, kept so that it is not reused
        with self._sending:
            self._take_in(list(self._pushed.values()))  # before these messages may end a round
            sent = [self._pack(message, timeout, held) for message in messages]
            self._tracker.sent(messages)
            self._relay.send([one.order for one in sent])
        return sent

    def _pack(self, message: Message, timeout: float | None, held: dict[int, tuple[str, object]]) -> _Sent:
        number, device = next(self._numbers), self._devices.name(message.metadata.dst_node_id)
        give_id(message, f"{self._run.run_id}-{number}")
        content = message.content
        if id(content) in held:
            sha256 = self._relay.hold_again(held[id(content)][0])
        else:
            sha256 = self._relay.hold(wire.pack_order(self._run_config, content))
            held[id(content)] = sha256, content
        ttl_s = message.metadata.ttl
        order = {
            "number": number,
            "device": device,
            "envelope": wire.pack_envelope(message),
            "content": sha256,
            "within_s": max(1e-3, ttl_s if timeout is None else min(timeout, ttl_s)),
        }
        return _Sent(order, without_content(message))

    def _timeout(self, sent: Collection[_Sent]) -> _Timeout:
        within_s = max((one.order["within_s"] for one in sent), default=0.0)
        return _Timeout(within_s, self._relay, self._tracker.clock)

    def _arriving(self, sent: Collection[_Sent], until: _Timeout | None) -> Iterator[Message]:
        """Yield replies as they come, until the timeout; then the remaining messages are dropped.

        Without a timeout: yield the replies so far, and keep the remaining messages.
        """
        waiting = {one.order["number"]: one for one in sent}
        try:
            while waiting:
                wait_s = max(0.0, until.next_s - self._tracker.clock()) if until is not None else 0.0
                line = self._relay.next_reply(waiting.keys(), wait_s)
                if line is None:
                    if until is None or until.is_over():
                        return
                    continue
                one = waiting.pop(line["number"])
                reply = self._opened(one, line)
                self._relay.done([one.order])
                self._tracker.answered(one.request, reply)
                yield reply
        finally:
            if until is not None:
                self._relay.done([one.order for one in waiting.values()])

    def _opened(self, sent: _Sent, line: Json) -> Message:
        if not line["size"]:
            code = ErrorCode.NODE_UNAVAILABLE if line["lost"] else ErrorCode.CLIENT_APP_CRASHED
            reply = error_reply(sent.request, line["reason"] or "no reason given", code)
        else:
            try:
                reply = wire.open_reply(self._relay.fetch(line["number"]), sent.request)
            except ProtocolError as error:
                reply = error_reply(sent.request, f"device {line['device']}: {error}", ErrorCode.UNKNOWN)
        give_id(reply, f"{self._run.run_id}-reply-{line['number']}")
        return reply
