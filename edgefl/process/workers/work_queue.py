"""Work that waits for a worker: taken from its source when it is needed, put back when a worker was lost."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

M = TypeVar("M")  # what a worker is asked


@dataclass(eq=False, slots=True)
class WorkItem(Generic[M]):
    """One message, which one worker is to answer."""

    message: M
    losses: int = 0  # of workers, while they were at work on it


class WorkQueue(Generic[M]):
    """Items in their order. Once `stopped` says so, there are no more.

    `split` cuts a message in parts when a worker was lost over it, so that only the part to blame is lost the next
    time. `may_begin` can hold the first message back while workers are busy.
    """

    def __init__(
        self, source: Iterable[M], *, split: Callable[[M], Sequence[M]] = lambda message: [message],
        stopped: Callable[[], bool] = lambda: False, may_begin: Callable[[M], bool] = lambda _message: True,
    ) -> None:  # fmt: skip
        self._source, self._waiting = iter(source), deque[WorkItem[M]]()
        self._split, self._stopped, self._may_begin = split, stopped, may_begin

    def more(self, than: int = 0) -> bool:
        """Say whether more than so many wait."""
        if self._stopped():
            self._waiting.clear()
            return False
        self._waiting.extend(map(WorkItem, islice(self._source, max(0, than + 1 - len(self._waiting)))))
        return len(self._waiting) > than

    def first(self) -> M:
        """Return the message that is next, and leave it there; call `more` before."""
        return self._waiting[0].message

    def may_begin(self) -> bool:
        """Say whether the first item may begin while workers are busy; call `more` before."""
        return self._may_begin(self.first())

    def take(self) -> WorkItem[M]:
        return self._waiting.popleft()

    def put_back(self, items: Iterable[WorkItem[M]]) -> None:
        """Put items before all others, in their order."""
        self._waiting.extendleft(reversed(list(items)))

    def retry(self, item: WorkItem[M]) -> None:
        """Put an item that cost a worker before all others, in parts."""
        self.put_back(WorkItem(part, item.losses) for part in self._split(item.message))

    def rest(self) -> Iterator[M]:
        """Take all that is left."""
        while self.more():
            yield self.take().message
