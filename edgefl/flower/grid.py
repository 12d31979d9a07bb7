"""A Grid whose nodes are here: what a ServerApp pushes is executed by a runner, and answered as it comes.

`send_and_receive` returns replies that arrive while they are iterated, so that a strategy may fold them
one by one; they may also be counted, indexed and iterated again, as the lists that Flower's grids return.
Invariant: every pushed message is executed, whether or not its reply is looked at; but for Ctrl-C, which ends the
round with what was answered, and the run where the next round would begin.
"""

from __future__ import annotations

import _thread
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import overload

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from edgefl.errors import ConfigError
from edgefl.flower.inside import Run, RunNotRunningException, give_id, with_own_metadata
from edgefl.flower.nodes import Delivery, Nodes, Runner
from edgefl.flower.records import copy_records
from edgefl.flower.watch import Watch


class Replies(Sequence[Message]):
    """Replies that arrive while they are iterated. Safe to iterate from several threads."""

    def __init__(self, arriving: Iterator[Message]) -> None:
        self._arriving = arriving
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
            yield from self._arriving
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
                reply = next(self._arriving, None)
                if reply is None:
                    return False
                self._kept.append(reply)
            return True


class RunGrid(Grid):
    """What every grid of ours is: that of one run, which nobody changes."""

    def __init__(self, run_id: int) -> None:
        self._run = Run.create_empty(run_id)

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
        self._waiting: dict[str, Message] = {}  # pushed, not yet pulled
        self._unread: list[Replies] = []

    def get_node_ids(self) -> Iterable[int]:
        if self._closed:  # a thread of the legacy server that Ctrl-C left behind looks for this, and ends
            raise RunNotRunningException
        return list(self._nodes.ids())

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages; they are executed when their replies are pulled."""
        self.finish()
        outgoing = self._snapshots(messages)
        self._waiting |= outgoing
        return list(outgoing)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Execute what waits among these ids and return the replies; nothing for an id already pulled."""
        wanted = dict.fromkeys(message_ids)
        asked = {key: self._waiting.pop(key) for key in wanted if key in self._waiting}
        return list(self._execute(asked, None))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Replies:
        """Execute messages; the replies arrive as they are iterated, until the timeout (seconds)."""
        self.finish()
        outgoing = self._snapshots(messages)
        replies = Replies(self._execute(outgoing, timeout))
        if len(outgoing) > 1:
            self._unread.append(replies)
        else:
            len(replies)  # the legacy server sends one message at a time, from many threads
        return replies

    def finish(self) -> None:
        """Execute what was sent and never looked at."""
        unread, self._unread = self._unread, []
        for replies in unread:
            len(replies)

    def close(self) -> None:
        """Drop what was sent and never looked at; nothing more is sent."""
        self._closed = True
        for replies in self._unread:
            replies.close()

    def _snapshots(self, messages: Iterable[Message]) -> dict[str, Message]:
        """Give each message its id, and keep it as it is now; one copy of a content that many share."""
        messages = list(messages)
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
        raise KeyboardInterrupt

    def _execute(self, requests: dict[str, Message], timeout: float | None) -> Iterator[Message]:
        ttl_s = max((request.metadata.ttl for request in requests.values()), default=0.0)
        deadline_s = self._watch.clock() + (ttl_s if timeout is None else min(timeout, ttl_s))
        deliveries = (
            Delivery(request, self._nodes.context(request.metadata.dst_node_id))
            for request in requests.values()
            if not self._stop.is_set()
        )
        for answer in self._runner.run(deliveries, deadline_s):
            self._nodes.keep(answer)
            give_id(answer.reply, f"{self._run.run_id}-{next(self._numbers)}")
            self._watch.answered(requests[answer.reply.metadata.reply_to_message_id], answer.reply)
            yield answer.reply


def streamed(replies: Iterable[Message]) -> Iterator[Message]:
    """Iterate a grid's replies once, keeping none of them where the grid is ours."""
    return replies.once() if isinstance(replies, Replies) else iter(replies)
