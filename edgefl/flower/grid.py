"""A Grid whose nodes are here: what a ServerApp pushes is executed by a runner, and answered as it comes.

`send_and_receive` returns replies that arrive while they are iterated, so that a strategy may fold them
one by one; they may also be counted, indexed and iterated again, as the lists that Flower's grids return.
Invariants: every pushed message is executed, whether or not its reply is looked at or pulled, before any later one
to the same node and before the run ends; but for Ctrl-C, which ends the round with what was answered, and the run
where the next round would begin. A node is at work on one message at a time.
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
from edgefl.flower.apps.own_fault import Border
from edgefl.flower.inside import Interrupted, Run, RunNotRunningException, give_id, with_own_metadata
from edgefl.flower.nodes import Delivery, Nodes, Runner
from edgefl.flower.records import copy_records
from edgefl.flower.watch import Watch

PATIENT_LOOKS, PATIENT_S = 10, 8.0  # an app that looks for nodes so often, for so long, waits for others


class Replies(Sequence[Message]):
    """Replies that arrive while they are iterated. Safe to iterate from several threads."""

    def __init__(self, arriving: Iterator[Message], border: Border | None = None) -> None:
        self._arriving, self._border = arriving, border or Border()
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
        """Yield the replies without keeping them; closing the iterator leaves the rest of them undone."""
        try:
            while (reply := self._next()) is not None:
                yield reply
        finally:
            self.close()

    def close(self) -> None:
        """Let the rest be: what was not started will not be."""
        close: Callable[[], None] | None = getattr(self._arriving, "close", None)
        if close is not None:
            close()

    def _more(self, index: int) -> bool:
        """Say whether there is a reply of that index, waiting for it if need be."""
        with self._turn:
            while index >= len(self._kept):
                reply = self._next()
                if reply is None:
                    return False
                self._kept.append(reply)
            return True

    def _next(self) -> Message | None:
        with self._border:
            return next(self._arriving, None)


class RunGrid(Grid):
    """What every grid of ours is: that of one run, which nobody changes."""

    def __init__(self, run_id: int) -> None:
        self._run = Run.create_empty(run_id)
        self.border = Border()  # what fails inside is our fault

    def set_run(self, run: Run) -> None:
        raise ConfigError(f"this grid belongs to run {self._run.run_id}; it cannot be set to {run.run_id}")

    @property
    def run(self) -> Run:
        return Run(**vars(self._run))

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message (deprecated by Flower in favour of `Message`)."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)


class LocalGrid(RunGrid):
    """Carries messages between a ServerApp and the nodes of one run."""

    def __init__(
        self, run_id: int, nodes: Nodes, runner: Runner, watch: Watch, stop: threading.Event | None = None
    ) -> None:
        super().__init__(run_id)
        self._stop = stop or threading.Event()  # set: no more clients begin, and no more rounds
        self._closed = False
        self._stopping = threading.Lock()  # held by who told the main thread
        self._nodes, self._runner, self._watch = nodes, runner, watch
        self._numbers = itertools.count(1)
        self._waiting: dict[str, Message] = {}  # pushed, not yet executed, in the order of pushing
        self._replies: dict[str, Message] = {}  # to what was pushed, not yet pulled
        self._unread: list[Replies] = []
        self._settling = threading.RLock()
        self._looks: list[float] = []  # for nodes, since something was sent: when

    def get_node_ids(self) -> Iterable[int]:
        if self._closed:  # a thread of the legacy server that Ctrl-C left behind looks for this, and ends
            raise RunNotRunningException
        self._refuse_endless_wait()
        return list(self._nodes.ids())

    def _refuse_endless_wait(self) -> None:
        """Raise where the app looks for nodes again and again, and sends nothing: there will be no others."""
        if threading.current_thread() is not threading.main_thread():  # the legacy server's looks all the time
            return
        self._looks.append(self._watch.clock())
        if len(self._looks) >= PATIENT_LOOKS and self._looks[-1] - self._looks[0] >= PATIENT_S:
            raise ConfigError(
                f"the app waits for more nodes than the {len(self._nodes.ids())} of this simulation, and no more will "
                "come: give --clients N or --federation-config num-supernodes=N, or have the app wait for fewer"
            )

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages; they are executed when their replies are pulled, or when what comes later needs it."""
        with self.border:
            self._read_all()
            outgoing = self._snapshots(messages)
            self._waiting |= outgoing
            return list(outgoing)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Execute what waits among these ids and return the replies; nothing for an id already pulled."""
        wanted = list(dict.fromkeys(message_ids))
        with self.border:
            self._settle(self._due(wanted, ()))
            return [self._replies.pop(key) for key in wanted if key in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Replies:
        """Execute messages; the replies arrive as they are iterated. `timeout`: seconds for each client's own work."""
        if timeout is not None and timeout <= 0:  # nobody waits for replies
            self.push_messages(messages)
            return Replies(iter(()))
        with self.border:
            self._read_all()
            outgoing = self._snapshots(messages)
            self._settle(self._due((), {message.metadata.dst_node_id for message in outgoing.values()}))
        replies = Replies(self._execute(outgoing, timeout), self.border)
        if len(outgoing) > 1:
            self._unread.append(replies)
        else:
            len(replies)  # the legacy server sends one message at a time, from many threads
        return replies

    def finish(self) -> None:
        """Execute what was sent and never looked at, and what was pushed and never pulled."""
        with self.border:
            self._read_all()
            self._settle(list(self._waiting))

    def _read_all(self) -> None:
        unread, self._unread = self._unread, []
        for replies in unread:
            len(replies)

    def _due(self, ids: Collection[str], nodes: Collection[int]) -> list[str]:
        """Return what waits among these ids, and all that waits before it, or before what comes next, at a node."""
        due, busy = [], set(nodes)
        for key, message in reversed(list(self._waiting.items())):
            if key in ids or message.metadata.dst_node_id in busy:
                busy.add(message.metadata.dst_node_id)
                due.append(key)
        return due[::-1]

    def _settle(self, keys: Sequence[str]) -> None:
        """Execute what was pushed, and keep the replies for who pulls them."""
        with self._settling:  # the legacy server sends from many threads
            due = {key: self._waiting.pop(key) for key in keys if key in self._waiting}
            for reply in self._execute(due, None):
                self._replies[reply.metadata.reply_to_message_id] = reply

    def close(self) -> None:
        """Drop what was sent and never looked at; nothing more is sent."""
        self._closed = True
        for replies in self._unread:
            replies.close()

    def _snapshots(self, messages: Iterable[Message]) -> dict[str, Message]:
        """Give each message its id, and keep it as it is now; one copy of a content that many share."""
        messages = checked_messages(messages)
        self._looks.clear()
        self._refuse_next_round(messages)
        snapshots: dict[str, Message] = {}
        copies: dict[int, tuple[RecordDict, RecordDict]] = {}  # with the original, so that its id stays its own
        for message in messages:
            self._nodes.context(message.metadata.dst_node_id)
            give_id(message, f"{self._run.run_id}-{next(self._numbers)}")
            if id(message.content) not in copies:
                copies[id(message.content)] = (message.content, copy_records(message.content))
            snapshot = with_own_metadata(message)
            _, snapshot.content = copies[id(message.content)]
            snapshots[message.metadata.message_id] = snapshot
        self._watch.sent(list(snapshots.values()))
        return snapshots

    def _refuse_next_round(self, messages: Sequence[Message]) -> None:
        """Raise KeyboardInterrupt, in the main thread, where a round begins after the stop."""
        if not self._stop.is_set() or not messages or not self._watch.opens_round(messages[0]):
            return
        if threading.current_thread() is not threading.main_thread() and self._stopping.acquire(blocking=False):
            _thread.interrupt_main()  # the legacy server sends from threads, and takes what they raise for failures
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
                self._watch.answered(requests[answer.reply.metadata.reply_to_message_id], answer.reply)
                yield answer.reply


def _waves(requests: Iterable[Message]) -> list[list[Message]]:
    """Deal messages out so that none comes before an earlier one to the same node, which then has a new state."""
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
    """Return what a ServerApp sends as a list; raises ConfigError for what is no Message with content."""
    listed = list(messages)
    for one in listed:
        if not isinstance(one, Message) or not one.has_content():
            seen = "a Message without content" if isinstance(one, Message) else f"a {type(one).__name__}"
            raise ConfigError(f"the ServerApp sent {seen}; expected Messages with a RecordDict as content")
    return listed


def streamed(replies: Iterable[Message]) -> Iterator[Message]:
    """Iterate a grid's replies once, keeping none of them where the grid is ours."""
    return replies.once() if isinstance(replies, Replies) else iter(replies)
