"""ClientApps in worker processes of this machine, one thread each, started when first needed.

A message's records are sent pickled, once to each worker for all messages that share them; a node's state is sent
with its message and comes back with its answer. A worker gets its next small message while it works on one,
so that it need not wait.
Invariants: the message of a worker that dies is repeated by another (`edgefl/process/workers/pool.py`),
and a message that kills two workers is answered with an Error; no worker outlives its run.
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
from edgefl.flower.internals import ErrorCode, error_reply, without_content
from edgefl.flower.nodes import Delivery, NodeReply, execute
from edgefl.process.workers.pool import MAX_LOSSES, MAX_STARTS, ItemAnswered, NoWorkerLeft, RunTerms, WorkerPool
from edgefl.process.workers.process import ONE_THREAD, WorkerProcess, wait_for_processes
from edgefl.process.workers.work_queue import WorkQueue

SMALL_BYTES = 32 << 10  # fit into an unread pipe, so that sending does not block
LOAD_S = 60.0  # minimum time for a process to import the app


@dataclass(frozen=True, slots=True)
class MessageContent:
    """The content of a worker's next messages, pickled, because each client may change its copy."""

    data: bytes


@dataclass(frozen=True, slots=True)
class MessageEnvelope:
    """A message without its content, and the context of its node; a worker answers with a NodeReply."""

    message: Message
    context: Context


@dataclass(frozen=True, slots=True)
class _Packed:
    """A content, and its `MessageContent` as bytes."""

    content: RecordDict | None
    data: bytes


@dataclass(frozen=True, slots=True)
class _Parcel:
    """A message for a worker."""

    delivery: Delivery
    envelope: bytes  # a `MessageEnvelope`
    packed: _Packed


class Workers:
    """A runner in worker processes. Thread-safe. At the end of its context no process is left."""

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
        """The sum of the workers' peak memory."""
        return self._pool.peak_rss_mb

    def start(self) -> None:
        """Start them all, without waiting."""
        self._pool.start()

    @property
    def ready(self) -> bool:
        """Whether each started worker has loaded the app, or died."""
        return self._pool.ready

    def pids(self) -> list[int]:
        """Return the processes that are running."""
        return [worker.pid for worker in self._pool.workers]

    def run(self, deliveries: Iterable[Delivery], within_s: float) -> Iterator[NodeReply]:
        """Yield answers as they arrive; a message that takes longer is given up, and its worker killed."""
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


def _crashed(delivery: Delivery, how: str) -> NodeReply:
    """Answer a message with an Error, because its process has died too often."""
    reason = (
        f"the process of the ClientApp died {how}. Its output is in this command's own output; "
        "`--engine loop` runs the app in this process"
    )
    reply = error_reply(delivery.message, reason, ErrorCode.CLIENT_APP_CRASHED)
    return NodeReply(reply, delivery.context.node_id, None)


class AppProcess(WorkerProcess):
    """A worker process with an app, and the last content sent to it."""

    def __init__(self, start: bytes) -> None:
        own = {name: one for name, one in ONE_THREAD.items() if name not in os.environ}  # the user's setting wins
        super().__init__(start, environment=own)
        self._holds: _Packed | None = None

    def takes(self, parcel: _Parcel) -> bool:
        """Whether it can get a message while it works, without blocking the sender."""
        size = len(parcel.envelope) + (0 if self._holds is parcel.packed else len(parcel.packed.data))
        return size <= SMALL_BYTES

    def ask(self, message: Any) -> None:
        """Send a `_Parcel`: its content, unless the process already has it, and its envelope."""
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
    """The start data of a worker: its app."""

    folder: Path

    def begin(self) -> Callable[[MessageContent | MessageEnvelope], NodeReply | None]:
        return _AppWorker(self.folder).answer


class _AppWorker:
    """In the worker: answers messages with the app's ClientApp."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._content = folder, b""
        self._client_app: ClientApp | None = None
        with suppress(ConfigError, TaskError):  # raised again for each message
            self._client_app = load_client_app(folder)

    def answer(self, message: MessageContent | MessageEnvelope) -> NodeReply | None:
        if isinstance(message, MessageContent):
            self._content = message.data
            return None
        request, context = message.message, message.context
        request.content = pickle.loads(self._content)  # noqa: S301 - each time, since each client may change its own
        try:
            self._client_app = self._client_app or load_client_app(self._folder)
        except (ConfigError, TaskError) as error:
            reply = error_reply(request, str(error), ErrorCode.LOAD_CLIENT_APP_EXCEPTION)
            return NodeReply(reply, context.node_id, None)
        return execute(self._folder.name, self._client_app, Delivery(request, context))
