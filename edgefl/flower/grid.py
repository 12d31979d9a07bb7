"""A Grid with local nodes: a runner executes the messages that a ServerApp pushes; replies arrive as they are ready.

`send_and_receive` returns replies that arrive while they are iterated, so that a strategy can fold them
one by one; they can also be counted, indexed and iterated again, like the lists that Flower's grids return.
Invariants: every pushed message is executed, whether or not its reply is read or pulled, before any later one
to the same node and before the run ends. Exception: Ctrl-C ends the round with the replies so far, and the run
before the next round. A node handles one message at a time.
"""

from __future__ import annotations

import _thread
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import overload

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from edgefl.errors import ConfigError
from edgefl.flower.apps.error_boundary import ErrorBoundary
from edgefl.flower.internals import Interrupted, Run, RunNotRunningException, give_id, with_own_metadata
from edgefl.flower.nodes import Delivery, Nodes, Runner
from edgefl.flower.records import copy_records
from edgefl.flower.tracker import RoundTracker

PATIENT_LOOKS, PATIENT_S = 10, 8.0  # an app that asks for nodes this often and this long is waiting for more nodes


class Replies(Sequence[Message]):
    """Replies that arrive while they are iterated. Thread-safe."""

    def __init__(self, arriving: Iterator[Message], boundary: ErrorBoundary | None = None) -> None:
        self._arriving, self._boundary = arriving, boundary or ErrorBoundary()
        self._kept: list[Message] = []
        self._turn = threading.Lock()

    def __iter__(self) -> Iterator[Message]:
        for index in itertools.count():
            if index >= len(self._kept) and not self._more(index):
                return
            yield self._kept[index]

    def __len__(self) -> int:
        while self._more(len(self._kept)):
            pass
        return len(self._kept)

    def __bool__(self) -> bool:
        return self._more(0)

    @overload
    def __getitem__(self, index: int) -> Message: ...
    @overload
    def __getitem__(self, index: slice) -> list[Message]: ...
    def __getitem__(self, index: int | slice) -> Message | list[Message]:
        len(self)
        return self._kept[index]

    def once(self) -> Iterator[Message]:
        """Yield the replies without keeping them; closing the iterator cancels the messages not yet executed."""
        try:
            while (reply := self._next()) is not None:
                yield reply
        finally:
            self.close()

    def close(self) -> None:
        """Cancel the messages that were not started yet."""
        close: Callable[[], None] | None = getattr(self._arriving, "close", None)
        if close is not None:
            close()

    def _more(self, index: int) -> bool:
        """Whether there is a reply with this index; waits for it if necessary."""
        with self._turn:
            while index >= len(self._kept):
                reply = self._next()
                if reply is None:
                    return False
                self._kept.append(reply)
            return True

    def _next(self) -> Message | None:
        with self._boundary:
            return next(self._arriving, None)


class RunGrid(Grid):
    """Base of our grids: a grid belongs to one run for its whole life."""

    def __init__(self, run_id: int) -> None:
        self._run = Run.create_empty(run_id)
        self.boundary = ErrorBoundary()  # an error inside is edgefl's fault

    def set_run(self, run: Run) -> None:
        raise ConfigError(f"this grid belongs to run {self._run.run_id}; it cannot be set to {run.run_id}")

    @property
    def run(self) -> Run:
        return Run(**vars(self._run))

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Create a message (deprecated by Flower in favour of `Message`)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)


class LocalGrid(RunGrid):
    """Carries messages between a ServerApp and the nodes of one run."""

    def __init__(
        self, run_id: int, nodes: Nodes, runner: Runner, tracker: RoundTracker, stop: threading.Event | None = None
    ) -> None:
        super().__init__(run_id)
        self._stop = stop or threading.Event()  # if set, no more clients and no more rounds begin
        self._closed = False
        self._stopping = threading.Lock()  # held by the thread that interrupted the main thread
        self._nodes, self._runner, self._tracker = nodes, runner, tracker
        self._numbers = itertools.count(1)
        self._waiting: dict[str, Message] = {}  # pushed, not yet executed, in the order of pushing
        self._replies: dict[str, Message] = {}  # to pushed messages, not yet pulled
        self._unread: list[Replies] = []
        self._executing = threading.RLock()
        self._looks: list[float] = []  # times of the requests for nodes since the last send

    def get_node_ids(self) -> Iterable[int]:
        if self._closed:  # a thread that the legacy server left running after Ctrl-C ends on this
            raise RunNotRunningException
        self._refuse_endless_wait()
        return list(self._nodes.ids())

    def _refuse_endless_wait(self) -> None:
        """Raise if the app keeps asking for nodes without sending: it waits for nodes that never come."""
        if threading.current_thread() is not threading.main_thread():  # threads of the legacy server poll
            return
        self._looks.append(self._tracker.clock())
        if len(self._looks) >= PATIENT_LOOKS and self._looks[-1] - self._looks[0] >= PATIENT_S:
            raise ConfigError(
                f"the app waits for more nodes than the {len(self._nodes.ids())} of this simulation, and no more will "
                "come: give --clients N or --federation-config num-supernodes=N, or have the app wait for fewer"
            )

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Accept messages; they are executed when their replies are pulled, or when later messages require it."""
        with self.boundary:
            self._read_all()
            outgoing = self._snapshots(messages)
            self._waiting |= outgoing
            return list(outgoing)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Execute the waiting messages with these ids and return the replies; none for an id already pulled."""
        wanted = list(dict.fromkeys(message_ids))
        with self.boundary:
            self._execute_pushed(self._due(wanted, ()))
            return [self._replies.pop(key) for key in wanted if key in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Replies:
        """Execute messages; the replies arrive as they are iterated. `timeout`: seconds for each client's own work."""
        if timeout is not None and timeout <= 0:  # the caller does not wait for replies
            self.push_messages(messages)
            return Replies(iter(()))
        with self.boundary:
            self._read_all()
            outgoing = self._snapshots(messages)
            self._execute_pushed(self._due((), {message.metadata.dst_node_id for message in outgoing.values()}))
        replies = Replies(self._execute(outgoing, timeout), self.boundary)
        if len(outgoing) > 1:
            self._unread.append(replies)
        else:
            len(replies)  # the legacy server sends one message at a time, from many threads
        return replies

    def finish(self) -> None:
        """Execute messages whose replies were never read or pulled."""
        with self.boundary:
            self._read_all()
            self._execute_pushed(list(self._waiting))

    def _read_all(self) -> None:
        unread, self._unread = self._unread, []
        for replies in unread:
            len(replies)

    def _due(self, ids: Collection[str], nodes: Collection[int]) -> list[str]:
        """Return the waiting messages with these ids or for these nodes, and all earlier ones for the same nodes."""
        due, busy = [], set(nodes)
        for key, message in reversed(list(self._waiting.items())):
            if key in ids or message.metadata.dst_node_id in busy:
                busy.add(message.metadata.dst_node_id)
                due.append(key)
        return due[::-1]

    def _execute_pushed(self, keys: Sequence[str]) -> None:
        """Execute pushed messages, and keep the replies for `pull_messages`."""
        with self._executing:  # the legacy server sends from many threads
            due = {key: self._waiting.pop(key) for key in keys if key in self._waiting}
            for reply in self._execute(due, None):
                self._replies[reply.metadata.reply_to_message_id] = reply

    def close(self) -> None:
        """Drop messages whose replies were never read; nothing more is sent."""
        self._closed = True
        for replies in self._unread:
            replies.close()

    def _snapshots(self, messages: Iterable[Message]) -> dict[str, Message]:
        """Give each message its id, and copy it as it is now; messages that share a content share the copy."""
        messages = checked_messages(messages)
        self._looks.clear()
        self._refuse_next_round(messages)
        snapshots: dict[str, Message] = {}
        copies: dict[int, tuple[RecordDict, RecordDict]] = {}  # keeps the original too, so that its id() is not reused
        for message in messages:
            self._nodes.context(message.metadata.dst_node_id)
            give_id(message, f"{self._run.run_id}-{next(self._numbers)}")
            if id(message.content) not in copies:
                copies[id(message.content)] = (message.content, copy_records(message.content))
            snapshot = with_own_metadata(message)
            _, snapshot.content = copies[id(message.content)]
            snapshots[message.metadata.message_id] = snapshot
        self._tracker.sent(list(snapshots.values()))
        return snapshots

    def _refuse_next_round(self, messages: Sequence[Message]) -> None:
        """Raise KeyboardInterrupt in the main thread if a round begins after the stop."""
        if not self._stop.is_set() or not messages or not self._tracker.opens_round(messages[0]):
            return
        if threading.current_thread() is not threading.main_thread() and self._stopping.acquire(blocking=False):
            _thread.interrupt_main()  # the legacy server sends from threads, and counts their exceptions as failures
        raise Interrupted

    def _execute(self, requests: dict[str, Message], timeout: float | None) -> Iterator[Message]:
        for wave in _waves(requests.values()):
            ttl_s = max((request.metadata.ttl for request in wave), default=0.0)
            within_s = ttl_s if timeout is None else min(timeout, ttl_s)
            deliveries = (
                Delivery(request, self._nodes.context(request.metadata.dst_node_id))
                for request in wave
                if not self._stop.is_set()
            )
            for answer in self._runner.run(deliveries, within_s):
                self._nodes.keep(answer)
                give_id(answer.reply, f"{self._run.run_id}-{next(self._numbers)}")
                self._tracker.answered(requests[answer.reply.metadata.reply_to_message_id], answer.reply)
                yield answer.reply


def _waves(requests: Iterable[Message]) -> list[list[Message]]:
    """Split messages into batches with at most one message per node, in order, so that each sees the newest state."""
    waves: list[list[Message]] = []
    turns: Counter[int] = Counter()
    for request in requests:
        turn = turns[request.metadata.dst_node_id]
        turns[request.metadata.dst_node_id] += 1
        if turn == len(waves):
            waves.append([])
        waves[turn].append(request)
    return waves


def checked_messages(messages: Iterable[Message]) -> list[Message]:
    """Return a ServerApp's messages as a list; raises ConfigError for anything but a Message with content."""
    listed = list(messages)
    for one in listed:
        if not isinstance(one, Message) or not one.has_content():
            seen = "a Message without content" if isinstance(one, Message) else f"a {type(one).__name__}"
            raise ConfigError(f"the ServerApp sent {seen}; expected Messages with a RecordDict as content")
    return listed


def streamed(replies: Iterable[Message]) -> Iterator[Message]:
    """Iterate a grid's replies once; replies of our grids are not kept."""
    return replies.once() if isinstance(replies, Replies) else iter(replies)
