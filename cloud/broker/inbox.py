"""A queue with a thread that processes items in order, and retries while the database or the disk is unavailable.

The event loop does not process them itself: SQLite may wait 10 seconds for a lock, and a disk may stay full for long.
Meanwhile no message may be lost, and keep-alives must be answered.
Invariant: an item is processed, or rejected (ProtocolError, or a bug: both are logged), or dropped for MAX_WAITING
newer ones of its key; no item stops the thread.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from cloud.state.storage import waits_for
from edgefl.errors import ProtocolError
from edgefl.logs import event
from edgefl.protocols.backoff import Backoff

MAX_WAITING = 64  # items per key
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
CLOSE_S = 15.0  # longer than SQLite waits for a lock

_log = logging.getLogger(__name__)

_T = TypeVar("_T")


def is_temporary(error: BaseException) -> bool:
    """Whether an error is temporary: a locked database, a full disk, no free descriptors."""
    return isinstance(error, PoolTimeoutError) or bool(waits_for(error))


class Inbox(Generic[_T]):
    """Takes items from any thread, and processes them in its own thread by `work`."""

    def __init__(self, name: str, work: Callable[[_T], None]) -> None:
        self._name, self._work = name, work
        self._order: deque[str] = deque()
        self._items: dict[str, deque[_T]] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._reason = ""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, key: str, item: _T) -> None:
        """Queue an item; if MAX_WAITING of its key are waiting, drop the oldest of them."""
        with self._changed:
            items = self._items.setdefault(key, deque(maxlen=MAX_WAITING))
            full = len(items) == MAX_WAITING
            items.append(item)
            if not full:
                self._order.append(key)
                self._changed.notify()
        if full:
            event(_log, logging.WARNING, "inbox.dropped", inbox=self._name, key=key, waiting=MAX_WAITING)

    @property
    def reason(self) -> str:
        """Why the first item is retried; empty if it is not."""
        return self._reason

    def close(self) -> None:
        """Stop the thread after its current item; drop the waiting ones."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while (item := self._next()) is not None:
            pauses = Backoff(FIRST_PAUSE_S, LONGEST_PAUSE_S)
            while not self._is_done(*item):
                with self._changed:
                    if self._changed.wait_for(lambda: self._closed, pauses.next_s()):
                        return

    def _next(self) -> tuple[str, _T] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._order or self._closed)
            if self._closed:
                return None
            key = self._order.popleft()
            items = self._items[key]
            item = items.popleft()
            if not items:
                del self._items[key]
            return key, item

    def _is_done(self, key: str, item: _T) -> bool:
        """Process an item; False if it must be retried."""
        try:
            self._work(item)
        except ProtocolError as fault:
            event(_log, logging.WARNING, "inbox.refused", inbox=self._name, key=key, reason=fault)
        except Exception as error:  # noqa: BLE001 - a bug costs only the message that triggers it
            if is_temporary(error):
                if not self._reason:
                    event(_log, logging.ERROR, "inbox.waits", inbox=self._name, key=key, reason=error)
                self._reason = str(error)
                return False
            _log.critical("inbox.item_lost inbox=%s key=%r", self._name, key, exc_info=True)
        self._reason = ""
        return True
