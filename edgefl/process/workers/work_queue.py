"""Work that waits for a worker: taken from its source on demand, and put back when a worker is lost."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

M = TypeVar("M")  # type of messages to workers


@dataclass(eq=False, slots=True)
class WorkItem(Generic[M]):
    """One message for one worker."""

    message: M
    losses: int = 0  # workers lost while they worked on it


class WorkQueue(Generic[M]):
    """Items in order. After `stopped` returns true, there are no more.

    `split` splits a message after a worker was lost on it, so that next time only the faulty part is lost.
    `may_begin` can delay the first message while workers are busy.
    """

    def __init__(
        self, source: Iterable[M], *, split: Callable[[M], Sequence[M]] = lambda message: [message],
        stopped: Callable[[], bool] = lambda: False, may_begin: Callable[[M], bool] = lambda _message: True,
    ) -> None:  # fmt: skip
        self._source, self._waiting = iter(source), deque[WorkItem[M]]()
        self._split, self._stopped, self._may_begin = split, stopped, may_begin

    def more(self, than: int = 0) -> bool:
        """Whether more than `than` items are waiting."""
        if self._stopped():
            self._waiting.clear()
            return False
        self._waiting.extend(map(WorkItem, islice(self._source, max(0, than + 1 - len(self._waiting)))))
        return len(self._waiting) > than

    def first(self) -> M:
        """Return the next message without taking it; call `more` before."""
        return self._waiting[0].message

    def may_begin(self) -> bool:
        """Whether the first item may begin while workers are busy; call `more` before."""
        return self._may_begin(self.first())

    def take(self) -> WorkItem[M]:
        return self._waiting.popleft()

    def put_back(self, items: Iterable[WorkItem[M]]) -> None:
        """Put items before all others, in order."""
        self._waiting.extendleft(reversed(list(items)))

    def retry(self, item: WorkItem[M]) -> None:
        """Split an item that cost a worker, and put its parts before all others."""
        self.put_back(WorkItem(part, item.losses) for part in self._split(item.message))

    def rest(self) -> Iterator[M]:
        """Take all remaining messages."""
        while self.more():
            yield self.take().message
