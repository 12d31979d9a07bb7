"""ClientApps in worker processes of this machine, one thread each, started when first needed.

A message's records travel pickled, once to each worker for all the messages that share them; a node's
state travels with its message and comes back with its answer. A worker is sent its next small message
while it is at work on one, so that it need not wait for us.
Invariants: a worker that dies takes no message with it: a new one does it again, and a message that kills
two of them is answered for by an Error; no worker outlives its run.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import islice
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from types import TracebackType
from typing import Self

from flwr.app import RecordDict
from flwr.clientapp import ClientApp

from edgefl.errors import ConfigError, TaskError
from edgefl.flower.apps.app import FlowerApp, load_client_app
from edgefl.flower.inside import ErrorCode, error_reply, without_content
from edgefl.flower.nodes import Answer, Delivery, execute
from edgefl.measure import how_ended, peak_rss_mb, seldom_collected
from edgefl.process.guardian import guardian

IN_FLIGHT = 2  # messages under way for each worker
SMALL_BYTES = 32 << 10  # lie in a pipe that nobody reads, so that sending them never waits
SOCKET_BYTES = 1 << 20  # of answers, that a worker may be ahead of us
MAX_CRASHES = 2  # workers that one message may take with it
MAX_WAIT_S = 1e6  # for one answer; the operating system cannot count far beyond
LOAD_S = 60.0  # for a process to import the app, at least
STOP_S = 5.0  # for a killed process to be gone
ONE_THREAD = "OMP_NUM_THREADS"  # torch and numpy's BLAS read it when they are imported


@dataclass(frozen=True, slots=True)
class _Packed:
    """A content and its bytes."""

    content: RecordDict | None
    data: bytes


@dataclass(slots=True)
class _Request:
    """A message to be done."""

    delivery: Delivery
    envelope: bytes
    packed: _Packed
    crashes: int = 0  # of workers, while at work on it


class Workers:
    """A runner in worker processes. Safe to call from several threads. At the end of its context no process is left."""

    def __init__(self, app: FlowerApp, number: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
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
        if self._threads_before is None:
            os.environ.pop(ONE_THREAD, None)

    @property
    def peak_rss_mb(self) -> float:
        """The most memory that each worker has held, added up."""
        return sum(worker.peak_rss_mb for worker in self._workers)

    def start(self) -> None:
        """Start them all, without waiting."""
        for worker in self._workers:
            worker.start(self._clock())

    @property
    def ready(self) -> bool:
        """Whether each that was started has loaded the app, or died of it."""
        return all(worker.ready for worker in self._workers)

    def pids(self) -> list[int]:
        """Return the processes that are running."""
        return [worker.pid for worker in self._workers if worker.pid is not None]

    def run(self, deliveries: Iterable[Delivery], within_s: float) -> Iterator[Answer]:
        """Yield answers as they come; one that needs longer is given up, and its worker killed."""
        todo = _Todo(map(self._request, deliveries))
        hands: list[_Worker] = []
        try:
            while True:
                yield from self._hand_out(todo, hands)
                awaited = {hand.connection: hand for hand in hands if hand.connection is not None}
                if not awaited:
                    return
                next_s = min(hand.late_s(within_s) for hand in awaited.values())
                answered = wait_for(list(awaited), max(0.0, min(next_s - self._clock(), MAX_WAIT_S)))
                for hand in [hand for one, hand in awaited.items() if one in answered]:
                    try:
                        answer = hand.hear(self._clock())
                    except (EOFError, OSError):
                        if hand.ended:
                            return
                        yield from _died(hand, todo)
                    else:
                        if answer is not None:
                            yield answer
                self._give_up_late(awaited.values(), todo, within_s)
        finally:
            for hand in hands:
                hand.forget()
                self._idle.put(hand)

    def _give_up_late(self, hands: Iterable[_Worker], todo: _Todo, within_s: float) -> None:
        """Kill who is at work for too long, drop what it is at, and have done again what waits behind that."""
        for hand in hands:
            if self._clock() < hand.late_s(within_s) or hand.has_said:
                continue
            lost = hand.kill()
            if not lost and todo.more():  # it has not even loaded the app, which this one waits for
                todo.take()
            todo.again([one for one in lost[1:] if one is not None])

    def _hand_out(self, todo: _Todo, hands: list[_Worker]) -> Iterator[Answer]:
        """Give all workers that we can have something to do, and let go who is done; answers for who kills them."""
        if todo.more():
            self._take_idle(hands)
        for hand in list(hands):
            if not todo.more() and hand.free:  # another may be behind with two
                todo.again(next(([one] for other in hands if (one := other.take_back()) is not None), []))
            if todo.more() and hand.connection is None:
                hand.start(self._clock())
            while todo.more(len(hands) if hand.at_work else 0) and hand.takes(todo.first()):
                try:
                    hand.ask(todo.take(), self._clock())
                except OSError:
                    yield from _died(hand, todo)
            if not todo.more() and not hand.awaited:
                hands.remove(hand)
                self._idle.put(hand)

    def _take_idle(self, hands: list[_Worker]) -> None:
        """Take workers that no other thread's run has; waits for one where we have none."""
        with suppress(queue.Empty):
            if not hands:
                hands.append(self._idle.get(timeout=MAX_WAIT_S))
            while True:
                hands.append(self._idle.get_nowait())

    def _request(self, delivery: Delivery) -> _Request:
        message, packed = delivery.message, self._packed
        if packed.content is not message.content:
            self._packed = packed = _Packed(message.content, pickle.dumps(message.content))
        return _Request(delivery, pickle.dumps((without_content(message), delivery.context)), packed)


class _Todo:
    """Requests that wait, some of them for the second time."""

    def __init__(self, source: Iterator[_Request]) -> None:
        self._source, self._waiting = source, deque[_Request]()

    def more(self, than: int = 0) -> bool:
        """Say whether more than so many wait."""
        self._waiting.extend(islice(self._source, max(0, than + 1 - len(self._waiting))))
        return len(self._waiting) > than

    def first(self) -> _Request:
        return self._waiting[0]

    def take(self) -> _Request:
        return self._waiting.popleft()

    def again(self, requests: Iterable[_Request]) -> None:
        self._waiting.extendleft(reversed(list(requests)))


def _died(worker: _Worker, todo: _Todo) -> Iterator[Answer]:
    """Have done again what a dead worker had; answers for a message that has killed too many."""
    how = worker.how_ended()
    lost = worker.kill()
    if not lost and todo.more():  # it died of its start, for this one
        lost = [todo.take()]
    guilty, others = (lost[0], [one for one in lost[1:] if one is not None]) if lost else (None, [])
    todo.again(others)
    if guilty is None:
        return
    guilty.crashes += 1
    if guilty.crashes < MAX_CRASHES:
        todo.again([guilty])
        return
    reason = (
        f"the process of the ClientApp died {MAX_CRASHES} times over this message; the last one {how}. "
        "What it printed stands in this command's own output; `--engine loop` runs the app in this process"
    )
    reply = error_reply(guilty.delivery.message, reason, ErrorCode.CLIENT_APP_CRASHED)
    yield Answer(reply, guilty.delivery.context.node_id, None)


class _Worker:
    """One process, started when it is first asked, and again after it was killed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process: multiprocessing.process.BaseProcess | None = None
        self.connection: Connection | None = None
        self._greeted = False  # whether it has said that it is there
        self._holds: _Packed | None = None  # the content that the process was sent last
        self._lock = threading.Lock()  # of starting against ending
        self._asked: deque[_Request | None] = deque()  # in the order of its answers; None: nobody waits for it
        self.ended = False
        self.began_s = 0.0  # with what it is at: its start, or a request
        self.peak_rss_mb = 0.0

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    @property
    def at_work(self) -> bool:
        return bool(self._asked)

    @property
    def free(self) -> bool:
        """Whether it could begin at once."""
        return self._greeted and not self._asked

    @property
    def awaited(self) -> bool:
        """Whether somebody waits for an answer of it."""
        return any(self._asked)

    def late_s(self, within_s: float) -> float:
        """Return when it has been too long at what it is at; loading the app is no client's own time."""
        return self.began_s + (within_s if self._greeted else max(within_s, LOAD_S))

    @property
    def has_said(self) -> bool:
        """Whether there is something to hear; of a dead one, too."""
        return self.connection is None or self.connection.poll(0)

    def takes(self, request: _Request) -> bool:
        """Say whether it can be sent a request now, without waiting for it to read."""
        if not self._greeted or self.connection is None:
            return False
        size = len(request.envelope) + (0 if self._holds is request.packed else len(request.packed.data))
        return not self._asked or (len(self._asked) < IN_FLIGHT and size <= SMALL_BYTES)

    def ask(self, request: _Request, now_s: float) -> None:
        """Send a request that it takes; raises OSError where the process is dead."""
        if self.connection is None:
            raise RuntimeError("start comes before ask")
        if not self._asked:
            self.began_s = now_s
        self._asked.append(request)
        self.connection.send_bytes(request.envelope)
        self.connection.send_bytes(b"" if self._holds is request.packed else request.packed.data)
        self._holds = request.packed

    def hear(self, now_s: float) -> Answer | None:
        """Return the answer that is there, if it is one that is waited for; raises EOFError or OSError of the dead."""
        if self.connection is None:
            raise EOFError
        data = self.connection.recv_bytes()
        self.began_s = now_s  # with the next one
        if not self._greeted:
            self._greeted = True
            return None
        answer: Answer
        answer, self.peak_rss_mb = pickle.loads(data)  # noqa: S301 - our own child's bytes
        return answer if self._asked.popleft() is not None else None

    def forget(self) -> None:
        """Want no more what it was asked."""
        self._asked = deque([None] * len(self._asked))

    def take_back(self) -> _Request | None:
        """Want no more what it has hardly begun, the last of several; returns that."""
        if len(self._asked) < IN_FLIGHT:
            return None
        last, self._asked[-1] = self._asked[-1], None
        return last

    def how_ended(self) -> str:
        """Say how a process that is gone has ended."""
        if self._process is None:
            return "closed its pipe"
        self._process.join(STOP_S)  # its end of the pipe closes a little before
        return "closed its pipe" if self._process.exitcode is None else how_ended(self._process.exitcode)

    def kill(self) -> list[_Request | None]:
        """Kill the process, if there is one; returns what it was asked."""
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._process.join(STOP_S)
                guardian.release(self._process.pid or 0)
            if self.connection is not None:
                self.connection.close()
            self._process = self.connection = self._holds = None
            self._greeted = False
        lost = list(self._asked)
        self._asked.clear()
        return lost

    def end(self) -> None:
        """Kill the process for good; who waits for its answer hears that it died."""
        with self._lock:
            self.ended = True
            if self._process is not None:
                self._process.kill()
                self._process.join(STOP_S)
                guardian.release(self._process.pid or 0)

    @property
    def ready(self) -> bool:
        """Whether it can be asked without waiting for its start."""
        return self._greeted or (self.connection is not None and self.connection.poll(0))

    def start(self, now_s: float) -> None:
        """Start the process, but for one that was ended; it loads the app, and says when it has."""
        self.began_s = now_s
        context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads half
        with self._lock:
            if self.ended:
                return
            self.connection, theirs = context.Pipe()
            _widen(theirs)
            arguments = (theirs, str(self._folder))
            self._process = context.Process(target=_serve, args=arguments, name="flower-worker", daemon=True)
            self._process.start()
            guardian.watch(self._process.pid or 0)  # until it is told something, it ends with its pipe
            theirs.close()  # so that its end closes with the process


def _widen(end: Connection) -> None:
    """Let the socket under a pipe hold a small model, so that who sends one goes on without waiting for its reader."""
    with socket.socket(fileno=os.dup(end.fileno())) as under:
        under.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)  # the system may grant less


def _serve(connection: Connection, folder: str) -> None:
    """Answer requests until there are no more: a worker's whole life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which ends us
    content = b""
    with seldom_collected():
        with suppress(ConfigError, TaskError):  # each message will be told
            _client_app(folder)
        connection.send_bytes(b"ready")
        while True:
            try:
                envelope, data = connection.recv_bytes(), connection.recv_bytes()
            except EOFError:
                return
            message, context = pickle.loads(envelope)  # noqa: S301 - our own parent's bytes
            content = data or content  # nothing: it is that of the message before
            message.content = pickle.loads(content)  # noqa: S301 - each time, since each client may change its own
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
