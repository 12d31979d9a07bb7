"""ClientApps in worker processes of this machine, one thread each, started when first needed.

A message's records travel pickled, once to each worker for all the messages that share them; a node's state travels
with its message and comes back with its answer. A worker is sent its next small message while it is at work on one,
so that it need not wait for us.
Invariants: a worker that dies takes no message with it: another one does it again (`edgefl/process/workers/pool.py`),
and a message that kills two of them is answered with an Error; no worker outlives its run.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from edgefl.errors import ConfigError, TaskError
from edgefl.flower.apps.app import FlowerApp, load_client_app
from edgefl.flower.inside import ErrorCode, error_reply, without_content
from edgefl.flower.nodes import Answer, Delivery, execute
from edgefl.process.workers.pool import MAX_LOSSES, MAX_STARTS, ItemAnswered, NoWorkerLeft, RunTerms, WorkerPool
from edgefl.process.workers.process import ONE_THREAD, WorkerProcess, wait_for_processes
from edgefl.process.workers.work_queue import WorkQueue

SMALL_BYTES = 32 << 10  # lie in a pipe that nobody reads, so that sending them never waits
LOAD_S = 60.0  # for a process to import the app, at least


@dataclass(frozen=True, slots=True)
class MessageContent:
    """What a worker is to take for the content of its next messages, pickled: each client may change its own."""

    data: bytes


@dataclass(frozen=True, slots=True)
class MessageEnvelope:
    """A message without its content, and the context of its node; a worker answers with an Answer."""

    message: Message
    context: Context


@dataclass(frozen=True, slots=True)
class _Packed:
    """A content, and a `MessageContent` as bytes."""

    content: RecordDict | None
    data: bytes


@dataclass(frozen=True, slots=True)
class _Parcel:
    """A message on its way to a worker."""

    delivery: Delivery
    envelope: bytes  # a `MessageEnvelope`
    packed: _Packed


class Workers:
    """A runner in worker processes. Safe to call from several threads. At the end of its context no process is left."""

    def __init__(self, app: FlowerApp, number: int, clock: Callable[[], float] = time.monotonic) -> None:
        start = pickle.dumps(AppStart(app.folder))
        self._packed = _Packed(None, b"")  # the last content
        self._pool: WorkerPool[AppProcess, _Parcel] = WorkerPool(
            [lambda: AppProcess(start)] * number,
            wait_for_processes,
            start_s=LOAD_S,
            ahead=AppProcess.takes,
            clock=clock,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._pool.close()

    @property
    def peak_rss_mb(self) -> float:
        """The most memory that each worker has held, added up."""
        return self._pool.peak_rss_mb

    def start(self) -> None:
        """Start them all, without waiting."""
        self._pool.start()

    @property
    def ready(self) -> bool:
        """Whether each that was started has loaded the app, or died of it."""
        return self._pool.ready

    def pids(self) -> list[int]:
        """Return the processes that are running."""
        return [worker.pid for worker in self._pool.workers]

    def run(self, deliveries: Iterable[Delivery], within_s: float) -> Iterator[Answer]:
        """Yield answers as they come; one that needs longer is given up, and its worker killed."""
        work = WorkQueue(map(self._parcel, deliveries))
        for event in self._pool.run(work, RunTerms(answer_s=within_s, retry_late=False)):
            if isinstance(event, ItemAnswered):
                yield event.answer
            elif isinstance(event, NoWorkerLeft):
                how = f"{MAX_STARTS} times before it had loaded the app; the last one {event.how}"
                yield from (_crashed(parcel.delivery, how) for parcel in work.rest() if event.died)
            elif event.died:
                how = f"{MAX_LOSSES} times over this message; the last one {event.how}"
                yield _crashed(event.message.delivery, how)

    def _parcel(self, delivery: Delivery) -> _Parcel:
        message, packed = delivery.message, self._packed
        if packed.content is not message.content:
            content = pickle.dumps(MessageContent(pickle.dumps(message.content)))
            self._packed = packed = _Packed(message.content, content)
        envelope = pickle.dumps(MessageEnvelope(without_content(message), delivery.context))
        return _Parcel(delivery, envelope, packed)


def _crashed(delivery: Delivery, how: str) -> Answer:
    """Answer a message with an Error, as its process has died too often."""
    reason = (
        f"the process of the ClientApp died {how}. What it printed stands in this command's own output; "
        "`--engine loop` runs the app in this process"
    )
    reply = error_reply(delivery.message, reason, ErrorCode.CLIENT_APP_CRASHED)
    return Answer(reply, delivery.context.node_id, None)


class AppProcess(WorkerProcess):
    """A worker process with an app, and the content that it was sent last."""

    def __init__(self, start: bytes) -> None:
        own = {name: one for name, one in ONE_THREAD.items() if name not in os.environ}  # the user's choice goes first
        super().__init__(start, environment=own)
        self._holds: _Packed | None = None

    def takes(self, parcel: _Parcel) -> bool:
        """Say whether it can be sent a message while it is at work, without waiting for it to read."""
        size = len(parcel.envelope) + (0 if self._holds is parcel.packed else len(parcel.packed.data))
        return size <= SMALL_BYTES

    def ask(self, message: Any) -> None:
        """Send a `_Parcel`: its content, unless the process holds that already, and its envelope."""
        parcel: _Parcel = message
        if self._holds is not parcel.packed:
            self.send_bytes(parcel.packed.data)
            self._holds = parcel.packed
        self.send_bytes(parcel.envelope)

    def end(self, *, kindly: bool = False) -> None:  # noqa: ARG002 - an app may leave threads that never end
        """End it at once."""
        super().end()


@dataclass(frozen=True, slots=True)
class AppStart:
    """The app that a worker loads."""

    folder: Path

    def begin(self) -> Callable[[MessageContent | MessageEnvelope], Answer | None]:
        return _AppWorker(self.folder).answer


class _AppWorker:
    """In the worker: answers messages by the app's ClientApp."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._content = folder, b""
        self._client_app: ClientApp | None = None
        with suppress(ConfigError, TaskError):  # each message will be told
            self._client_app = load_client_app(folder)

    def answer(self, message: MessageContent | MessageEnvelope) -> Answer | None:
        if isinstance(message, MessageContent):
            self._content = message.data
            return None
        request, context = message.message, message.context
        request.content = pickle.loads(self._content)  # noqa: S301 - each time, since each client may change its own
        try:
            self._client_app = self._client_app or load_client_app(self._folder)
        except (ConfigError, TaskError) as error:
            reply = error_reply(request, str(error), ErrorCode.LOAD_CLIENT_APP_EXCEPTION)
            return Answer(reply, context.node_id, None)
        return execute(self._folder.name, self._client_app, Delivery(request, context))
