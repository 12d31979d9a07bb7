"""A map that is kept equal at the other end of a stream, as between a region and its parent.

Entries are keys and bytes, and only their latest values matter: whatever is lost, repeated or reordered by a broken
connection, both ends are equal after the next one, because each stream begins with all entries. So a reader has no
state that could go wrong, and a writer keeps one pending change per key, however slow the reader is.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterable

from edgefl.errors import ProtocolError
from edgefl.protocols import fleet_pb2 as pb

MAX_ENTRIES = 500_000
MAX_KEY_CHARS = 300

# A function is called when the entry is sent, e.g. for a duration that is left; None = there is no such entry any more.
Value = bytes | Callable[[], bytes | None]


class Mirror:
    """The writer's side. Methods may be called from any thread; `items` is read by one stream, the newest."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, Value] = {}
        self._changed: dict[str, None] = {}  # keys, in the order of their first change
        self._reader: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    def set(self, key: str, value: Value) -> None:
        """Set an entry; does nothing if it has this value."""
        with self._lock:
            if self._values.get(key) != value:
                self._values[key] = value
                self._note(key)

    def delete(self, key: str) -> None:
        with self._lock:
            if self._values.pop(key, None) is not None:
                self._note(key)

    def replace(self, prefix: str, values: dict[str, Value]) -> None:
        """Make `values` the only entries whose keys begin with the prefix."""
        with self._lock:
            for key in [one for one in self._values if one.startswith(prefix) and one not in values]:
                del self._values[key]
                self._note(key)
            for key, value in values.items():
                if self._values.get(key) != value:
                    self._values[key] = value
                    self._note(key)

    def keys(self, prefix: str = "") -> list[str]:
        with self._lock:
            return [key for key in self._values if key.startswith(prefix)]

    def pending(self) -> int:
        """Return the number of changes that the reader has not got yet."""
        with self._lock:
            return len(self._changed)

    async def items(self) -> AsyncIterator[pb.TierItem]:
        """Yield all entries, then `complete`, then each change, until a newer stream reads them."""
        wake = asyncio.Event()
        mine = asyncio.get_running_loop(), wake
        with self._lock:
            if self._reader is not None:
                _wake(self._reader)  # it ends
            self._reader = mine
            self._changed.clear()
            keys: Iterable[str] = list(self._values)
        try:
            for key in keys:
                yield self._item(key)
            yield pb.TierItem(complete=True)
            while True:
                await wake.wait()
                wake.clear()
                with self._lock:
                    if self._reader is not mine:
                        return
                    keys, self._changed = list(self._changed), {}
                for key in keys:
                    yield self._item(key)
        finally:
            with self._lock:
                if self._reader is mine:
                    self._reader = None
                    self._changed.clear()

    def _item(self, key: str) -> pb.TierItem:
        with self._lock:
            value = self._values.get(key)
        data = value() if callable(value) else value
        return pb.TierItem(key=key, deleted=True) if data is None else pb.TierItem(key=key, value=data)

    def _note(self, key: str) -> None:
        """Note a change for the reader; the next one begins with all entries anyway. The caller has the lock."""
        if self._reader is not None:
            self._changed[key] = None
            _wake(self._reader)


def _wake(reader: tuple[asyncio.AbstractEventLoop, asyncio.Event]) -> None:
    loop, event = reader
    if not loop.is_closed():
        loop.call_soon_threadsafe(event.set)


class MirrorCopy:
    """The reader's side: `on_change` is called with each entry that is new or has another value, or with None.

    An entry that a new stream lacks is deleted while `is_complete` is still false: the writer did not say so, it may
    have been started again and not know it yet.
    """

    def __init__(self, on_change: Callable[[str, bytes | None], None]) -> None:
        self._on_change = on_change
        self._values: dict[str, bytes] = {}
        self._coming: dict[str, bytes] | None = {}  # of a stream that is not complete yet

    @property
    def is_complete(self) -> bool:
        """Whether the present stream has sent all entries."""
        return self._coming is None

    def begin(self) -> None:
        """A new stream begins; until it is complete, the entries stay as they are."""
        self._coming = {}

    def clear(self) -> None:
        """Delete all entries."""
        self.begin()
        self.take(pb.TierItem(complete=True))

    def take(self, item: pb.TierItem) -> None:
        """Take an item from the stream; raises ProtocolError for a key that is too long, or too many."""
        if len(item.key) > MAX_KEY_CHARS:
            raise ProtocolError(f"a key of {len(item.key)} characters; at most {MAX_KEY_CHARS} are allowed")
        values = self._values if self._coming is None else self._coming
        if len(values) >= MAX_ENTRIES and item.key not in values and not (item.complete or item.deleted):
            raise ProtocolError(f"more than {MAX_ENTRIES} entries")
        if item.complete:
            self._complete()
        elif self._coming is not None:
            if item.deleted:  # after the stream began
                self._coming.pop(item.key, None)
            else:
                self._coming[item.key] = item.value
        elif item.deleted:
            if self._values.pop(item.key, None) is not None:
                self._on_change(item.key, None)
        elif self._values.get(item.key) != item.value:
            self._values[item.key] = item.value
            self._on_change(item.key, item.value)

    def _complete(self) -> None:
        former, self._values = self._values, self._coming or {}
        for key in former.keys() - self._values.keys():
            self._on_change(key, None)
        for key, value in self._values.items():
            if former.get(key) != value:
                self._on_change(key, value)
        self._coming = None
