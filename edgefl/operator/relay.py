"""The operator's end of a relay: sends messages to devices, listens for replies in its own thread, fetches them.

It does not depend on Flower. It survives restarts of the cloud: a request without an answer is repeated, so
every request may arrive twice.
Invariant: once a relay has ended, for any reason, no caller waits for it any longer.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

from edgefl.errors import ConfigError, EdgeflError, JobCancelled, JobFailed, NotFound
from edgefl.operator.client import CloudClient, Json, Patience, insist
from edgefl.operator.follow import Waits, follow_relay
from edgefl.protocols.messages import BlobRef

BATCH = 250  # messages in one request, of a few hundred bytes each
MAX_SAID = 2000  # characters of a run's error
FAREWELL_S = 10.0  # at the end of a run: how long to retry with a silent cloud

_T = TypeVar("_T")


class Relay:
    """One running relay. A context manager: leaving it ends the relay as done, failed or cancelled. Thread-safe."""

    def __init__(  # noqa: PLR0913 - one a thing that may be chosen
        self, client: Callable[[], CloudClient], app: str, bundle: BlobRef, patience: Patience | None = None, *,
        name: str | None = None, label: str | None = None, on_waiting: Callable[[str], None] | None = None,
    ) -> None:  # fmt: skip
        self._open, self._app, self._bundle, self._name, self._label = client, app, bundle, name, label
        self._waits = Waits(on_waiting)
        self.told_paused_s = 0.0  # as last reported by the cloud: for how long its timeouts were paused
        self._patience = patience or Patience()
        self._turn = threading.RLock()  # protects the client; re-entered after Ctrl-C
        self._changed = threading.Condition()
        self._arrived: dict[int, Json] = {}
        self._wanted: set[int] = set()
        self._strays: set[int] = set()  # replies that no caller waits for any more
        self._held: Counter[str] = Counter()  # number of messages per content
        self._fault: EdgeflError | None = None
        self.id = ""

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            self._client = undo.enter_context(self._open())
            self.id = insist(
                lambda: self._client.start_relay(self._app, self._bundle, self._name, self._label), self._patience
            )
            undo.pop_all()
        self._listener = threading.Thread(target=self._listen, name=f"replies of {self.id}", daemon=True)
        self._listener.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        why = raised or self._fault
        state = (
            "done" if why is None else "cancelled" if isinstance(why, KeyboardInterrupt | JobCancelled) else "failed"
        )
        said = None if why is None else str(why)[:MAX_SAID] or type(why).__name__
        with self._client, suppress(EdgeflError):  # if this fails, the cloud's own timeout ends the relay
            insist(lambda: self._client.end_relay(self.id, state, said), Patience(seconds=FAREWELL_S))
        self.stop(JobCancelled(f"{self.id} is over"))
        self._listener.join(FAREWELL_S)

    @property
    def fault(self) -> EdgeflError | None:
        """The error that ended the relay, or None."""
        return self._fault

    def stop(self, fault: EdgeflError) -> None:
        """End the relay: all waiting and later calls raise `fault`."""
        with self._changed:
            self._fault = self._fault or fault
            self._changed.notify_all()

    def devices(self) -> list[str]:
        """Return the names of the devices that are online."""
        return [str(one["name"]) for one in self._ask(self._client.devices) if one["online"]]

    def hold(self, data: bytes) -> str:
        """Upload a message's content unless it is there already, and return its name. `done` releases it again."""
        sha256 = hashlib.sha256(data).hexdigest()
        with self._turn:
            if not self._held[sha256]:
                self._ask(lambda: self._client.put_content(self.id, data, sha256))
            self._held[sha256] += 1
        return sha256

    def hold_again(self, sha256: str) -> str:
        """Count one more message with the same content."""
        with self._turn:
            self._held[sha256] += 1
        return sha256

    def send(self, messages: Sequence[Json]) -> None:
        """Send messages, in ascending order of their numbers."""
        with self._changed:
            self._wanted |= {message["number"] for message in messages}
        for start in range(0, len(messages), BATCH):
            self._ask(partial(self._client.send_messages, self.id, messages[start : start + BATCH]))

    def next_reply(self, numbers: Collection[int], timeout_s: float) -> Json | None:
        """Wait for a reply to one of these messages; None at the timeout. Raises the error that ended the relay."""
        with self._changed:
            self._changed.wait_for(lambda: self._fault or not self._arrived.keys().isdisjoint(numbers), timeout_s)
            if self._fault is not None:
                raise self._fault
            ready = min(self._arrived.keys() & set(numbers), default=None)
            return None if ready is None else self._arrived.pop(ready)

    def paused_s(self) -> tuple[float, bool]:
        """Return for how many seconds the cloud's timeouts were paused in total, and whether they are paused now."""
        row = self._ask(lambda: self._client.job(self.id))
        self.told_paused_s = float(row.get("paused_s") or 0.0)
        return self.told_paused_s, bool(row.get("waiting"))

    def fetch(self, number: int) -> bytes:
        """Return a reply's bytes."""
        return self._ask(lambda: self._client.get_reply(self.id, number))

    def done(self, messages: Sequence[Json]) -> None:
        """Acknowledge messages, answered or not, so that the cloud deletes them; does nothing after the relay's end."""
        if not messages or self._fault is not None:
            return
        with self._changed:
            numbers = sorted({message["number"] for message in messages} | self._strays)
            self._wanted -= set(numbers)
            self._strays.clear()
            for number in numbers:
                self._arrived.pop(number, None)
        self._ask(lambda: self._client.relay_done(self.id, numbers))
        with self._turn:
            for message in messages:
                self._let_go(message["content"])

    def _let_go(self, sha256: str) -> None:
        self._held[sha256] -= 1
        if not self._held[sha256]:
            del self._held[sha256]
            self._ask(lambda: self._client.drop_content(self.id, sha256))

    def _ask(self, call: Callable[[], _T]) -> _T:
        """Call the cloud until it answers; if the relay has ended, raise the error that ended it."""
        if self._fault is not None:
            raise self._fault
        with self._turn:
            try:
                return insist(call, self._patience)
            except NotFound:
                with self._changed:  # the listener learns the reason shortly
                    self._changed.wait_for(lambda: self._fault, FAREWELL_S)
                raise self._fault or ConfigError(f"{self.id} is not known to the cloud") from None

    def _listen(self) -> None:
        try:
            with self._open() as client:
                for line in follow_relay(client, self.id, self._patience, on_event=self._on_event):
                    if self._fault is not None:
                        return
                    self._handle(line)
        except EdgeflError as error:
            self.stop(error)

    def _on_event(self, line: Json) -> None:
        self._waits.handle(line)
        self.told_paused_s = float(line.get("paused_s") or self.told_paused_s)

    def _handle(self, line: Json) -> None:
        if "state" in line:
            said = f"{self.id} is {line['state']}" + (f": {line['error']}" if line["error"] else "")
            self.stop(JobCancelled(said) if line["state"] == "cancelled" else JobFailed(said))
            return
        with self._changed:
            if line["number"] in self._wanted:
                self._arrived[line["number"]] = line
            else:
                self._strays.add(line["number"])
            self._changed.notify_all()
