"""ClientApps in worker processes of this machine, one thread each, started when first needed.

A message's records travel pickled, once to each worker for all the messages that share them; a node's
state travels with its message and comes back with its answer. One thread here attends to each worker.
Invariants: a worker that dies takes no message with it: a new one does it again, and a message that kills
two of them is answered for by an Error; no worker outlives its run.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Self

from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

from edgefl.errors import ConfigError, TaskError
from edgefl.flower.app import FlowerApp, load_client_app
from edgefl.flower.inside import ErrorCode, error_reply, without_content
from edgefl.flower.nodes import Answer, Delivery, execute
from edgefl.flower.records import copy_records
from edgefl.operator.run import peak_rss_mb

IN_FLIGHT = 2  # messages under way for each worker, so that it need not wait for us
MAX_CRASHES = 2  # workers that one message may take with it
MAX_WAIT_S = 1e6  # for one answer; the operating system cannot count far beyond
STOP_S = 5.0  # for a killed process to be gone
ONE_THREAD = "OMP_NUM_THREADS"  # torch and numpy's BLAS read it when they are imported


@dataclass(frozen=True, slots=True)
class _Packed:
    """A content and its bytes."""

    content: RecordDict | None
    data: bytes


class Workers:
    """A runner in worker processes. Use it as a context: at its end no process is left."""

    def __init__(self, app: FlowerApp, number: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._number = clock, number
        self._threads = ThreadPoolExecutor(number, "flower-worker")
        self._workers = [_Worker(app.folder) for _ in range(number)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._packed = _Packed(None, b"")  # the last content
        self._threads_before: str | None = None

    def __enter__(self) -> Self:
        self._threads_before = os.environ.get(ONE_THREAD)
        os.environ.setdefault(ONE_THREAD, "1")
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        for worker in self._workers:
            worker.end()
        self._threads.shutdown(wait=True, cancel_futures=True)
        if self._threads_before is None:
            os.environ.pop(ONE_THREAD, None)

    @property
    def peak_rss_mb(self) -> float:
        """The most memory that each worker has held, added up."""
        return sum(worker.peak_rss_mb for worker in self._workers)

    def start(self) -> None:
        """Start them all, without waiting."""
        for worker in self._workers:
            worker.start()

    @property
    def ready(self) -> bool:
        """Whether each that was started has loaded the app, or died of it."""
        return all(worker.ready for worker in self._workers)

    def pids(self) -> list[int]:
        """Return the processes that are running."""
        return [worker.pid for worker in self._workers if worker.pid is not None]

    def run(self, deliveries: Iterable[Delivery], deadline_s: float) -> Iterator[Answer]:
        """Yield answers as they come; what is under way at the deadline, or when we stop asking, is dropped."""
        source = iter(deliveries)
        flying: set[Future[Answer | None]] = set()
        try:
            while True:
                for delivery in islice(source, IN_FLIGHT * self._number - len(flying)):
                    flying.add(self._threads.submit(self._ask, delivery, deadline_s))
                if not flying:
                    return
                landed, flying = wait(flying, return_when=FIRST_COMPLETED)  # each ends by the deadline
                for future in landed:
                    if (answer := future.result()) is not None:
                        yield answer
        finally:
            for future in flying:
                future.cancel()

    def _ask(self, delivery: Delivery, deadline_s: float) -> Answer | None:
        """Have an idle worker answer: there is one for each of our threads. Nothing after the deadline."""
        envelope = pickle.dumps((without_content(delivery.message), delivery.context))
        packed = self._content_of(delivery.message)
        worker = self._idle.get_nowait()
        try:
            for _ in range(MAX_CRASHES):
                left_s = deadline_s - self._clock()
                if worker.ended or left_s <= 0:
                    return None
                try:
                    return worker.ask(envelope, packed, left_s)
                except (EOFError, OSError):
                    worker.kill()
        finally:
            self._idle.put(worker)
        reason = f"the process of the ClientApp died {MAX_CRASHES} times over this message"
        reply = error_reply(delivery.message, reason, ErrorCode.CLIENT_APP_CRASHED)
        return None if worker.ended else Answer(reply, delivery.context.node_id, None)

    def _content_of(self, message: Message) -> _Packed:
        packed = self._packed
        if packed.content is not message.content:
            self._packed = packed = _Packed(message.content, pickle.dumps(message.content))
        return packed


class _Worker:
    """One process, started when it is first asked, and again after it was killed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None
        self._greeted = False  # whether it has said that it is there
        self._holds: _Packed | None = None  # the content that the process was sent last
        self._lock = threading.Lock()  # of starting against ending
        self.ended = False
        self.peak_rss_mb = 0.0

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def ask(self, envelope: bytes, packed: _Packed, timeout_s: float) -> Answer | None:
        """Return the answer; kills the process and returns nothing where it takes too long.

        Raises EOFError or OSError where the process dies.
        """
        connection, timeout_s = self._connection or self.start(), min(timeout_s, MAX_WAIT_S)
        if not self._greeted:
            start_s = time.monotonic()
            if not connection.poll(timeout_s):
                self.kill()
                return None
            connection.recv_bytes()
            self._greeted, timeout_s = True, max(0.0, timeout_s - (time.monotonic() - start_s))
        connection.send_bytes(envelope)
        connection.send_bytes(b"" if self._holds is packed else packed.data)
        self._holds = packed
        if not connection.poll(timeout_s):
            self.kill()
            return None
        answer: Answer
        answer, self.peak_rss_mb = pickle.loads(connection.recv_bytes())  # noqa: S301 - our own child's bytes
        return answer

    def kill(self) -> None:
        """Kill the process, if there is one."""
        with self._lock:
            if self._process is not None and self._connection is not None:
                self._process.kill()
                self._process.join(STOP_S)
                self._connection.close()
            self._process = self._connection = self._holds = None
            self._greeted = False

    def end(self) -> None:
        """Kill the process for good; who waits for its answer hears that it died."""
        with self._lock:
            self.ended = True
            if self._process is not None:
                self._process.kill()
                self._process.join(STOP_S)

    @property
    def ready(self) -> bool:
        """Whether it can be asked without waiting for its start."""
        return self._greeted or (self._connection is not None and self._connection.poll(0))

    def start(self) -> Connection:
        """Start the process; it loads the app, and says when it has."""
        context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads half
        with self._lock:
            if self.ended:
                raise EOFError
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, str(self._folder)), name="flower-worker", daemon=True
            )
            process.start()
            theirs.close()  # so that its end closes with the process
            self._process, self._connection = process, ours
            return ours


def _serve(connection: Connection, folder: str) -> None:
    """Answer requests until there are no more: a worker's whole life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which ends us
    content = RecordDict()
    with suppress(ConfigError, TaskError):  # each message will be told
        _client_app(folder)
    connection.send_bytes(b"ready")
    while True:
        try:
            envelope, data = connection.recv_bytes(), connection.recv_bytes()
        except EOFError:
            return
        message, context = pickle.loads(envelope)  # noqa: S301 - our own parent's bytes
        if data:  # else it is the content of the message before
            content = pickle.loads(data)  # noqa: S301
        message.content = copy_records(content)
        answer = _answer(folder, Delivery(message, context))
        connection.send_bytes(pickle.dumps((answer, peak_rss_mb())))


def _answer(folder: str, delivery: Delivery) -> Answer:
    try:
        client_app = _client_app(folder)
    except (ConfigError, TaskError) as error:
        reply = error_reply(delivery.message, str(error), ErrorCode.LOAD_CLIENT_APP_EXCEPTION)
        return Answer(reply, delivery.context.node_id, None)
    return execute(Path(folder).name, client_app, delivery)


@cache
def _client_app(folder: str) -> ClientApp:
    return load_client_app(folder)
