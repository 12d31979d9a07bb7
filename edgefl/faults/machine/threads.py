"""What `threading`, `queue` and `concurrent.futures` are in a simulation: the same contracts, on fibers of the kernel.

An event loop that takes a lock of a fiber runs that fiber until it lets go: its real one would stand still as long.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError
from queue import Empty
from typing import Any

from edgefl.faults.machine.kernel import Fiber, Kernel, SimLoop, Stuck

_kernels: list[Kernel] = []  # the innermost simulation that runs


def enter(kernel: Kernel) -> None:
    """Make a kernel the one on which all objects of this module work."""
    _kernels.append(kernel)


def leave() -> None:
    """Undo `enter`."""
    _kernels.pop()


def kernel() -> Kernel:
    """Return the kernel of the simulation that runs."""
    if not _kernels:
        raise Stuck("no simulation runs")
    return _kernels[-1]


class SimLock:
    """`threading.Lock`."""

    is_reentrant = False

    def __init__(self) -> None:
        self.holder: Any = None
        self._depth = 0
        self._waiting: deque[Fiber] = deque()

    def acquire(self, blocking: bool = True) -> bool:  # noqa: FBT001, FBT002 - threading's
        sim = kernel()
        sim.give_way()
        me = sim.fiber or sim.node
        if self.is_reentrant and self.holder is me:
            self._depth += 1
            return True
        while self.holder is not None:
            if not blocking:
                return False
            if sim.fiber is None:
                sim.run_holder(self.holder)
            else:
                self._waiting.append(sim.fiber)
                sim.wait(self)
        self.holder, self._depth = me, 1
        return True

    def release(self) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.holder = None
            if self._waiting:
                kernel().wake(self._waiting.popleft())

    def locked(self) -> bool:
        return self.holder is not None

    def let_go(self) -> int:
        """Release it completely, for a wait; return how often it was held."""
        depth, self._depth = self._depth, 1
        self.release()
        return depth

    def take_back(self, depth: int) -> None:
        """Undo `let_go`."""
        self.acquire()
        self._depth = depth

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class SimRLock(SimLock):
    """`threading.RLock`."""

    is_reentrant = True


class SimCondition:
    """`threading.Condition`."""

    def __init__(self, lock: SimLock | None = None) -> None:
        self._lock = lock or SimRLock()
        self._waiting: deque[Fiber] = deque()
        self.acquire, self.release = self._lock.acquire, self._lock.release

    def __enter__(self) -> bool:
        return self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        sim = kernel()
        if sim.fiber is None:
            raise Stuck("an event loop waits for a condition")
        depth = self._lock.let_go()
        self._waiting.append(me := sim.fiber)
        try:
            return sim.wait(None, timeout)
        finally:
            if me in self._waiting:
                self._waiting.remove(me)
            if me.node.is_alive:
                self._lock.take_back(depth)

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        end_s = None if timeout is None else kernel().now_s + timeout
        while not (result := predicate()):
            left_s = None if end_s is None else end_s - kernel().now_s
            if left_s is not None and left_s <= 0:
                break
            self.wait(left_s)
        return result

    def notify(self, n: int = 1) -> None:
        for _ in range(min(n, len(self._waiting))):
            kernel().wake(self._waiting.popleft())

    def notify_all(self) -> None:
        self.notify(len(self._waiting))


class SimEvent:
    """`threading.Event`."""

    def __init__(self) -> None:
        self._changed, self._is_set = SimCondition(), False

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True
        self._changed.notify_all()

    def clear(self) -> None:
        self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        with self._changed:
            return bool(self._changed.wait_for(self.is_set, timeout))


class SimQueue:
    """`queue.SimpleQueue`."""

    def __init__(self) -> None:
        self._items: deque[Any] = deque()
        self._changed = SimCondition()

    def put(self, item: Any) -> None:
        self._items.append(item)
        self._changed.notify()

    def get(self, block: bool = True, timeout: float | None = None) -> Any:  # noqa: FBT001, FBT002 - queue's
        if not self._items and block:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._items), timeout)
        if not self._items:
            raise Empty
        return self._items.popleft()

    def empty(self) -> bool:
        return not self._items


class SimThread:
    """`threading.Thread`."""

    def __init__(
        self, target: Callable[..., object], name: str = "thread", args: tuple[Any, ...] = (), *, daemon: bool = False
    ) -> None:  # fmt: skip
        self._work, self.name, self.daemon = (lambda: target(*args)), name, daemon
        self._fiber: Fiber | None = None

    def start(self) -> None:
        node = kernel().node
        if node is None:
            raise Stuck(f"thread {self.name} starts outside of a node")
        self._fiber = node.spawn(self._work, self.name)

    def is_alive(self) -> bool:
        return self._fiber is not None and not self._fiber.is_done

    def join(self, timeout: float | None = None) -> None:
        ended = SimEvent()
        if self._fiber is not None and not self._fiber.is_done:
            self._fiber.on_end.append(ended.set)
            ended.wait(timeout)


class SimFuture:
    """`concurrent.futures.Future`."""

    def __init__(self) -> None:
        self._ended = SimEvent()
        self._value: Any = None
        self._error: BaseException | None = None
        self._is_cancelled = self._is_running = False
        self._calls: list[Callable[[SimFuture], object]] = []

    def done(self) -> bool:
        return self._ended.is_set()

    def running(self) -> bool:
        return self._is_running and not self.done()

    def cancelled(self) -> bool:
        return self._is_cancelled

    def cancel(self) -> bool:
        if self._is_running or self.done():
            return self._is_cancelled
        self._is_cancelled = True
        self._end()
        return True

    def begin(self) -> bool:
        """Whether the work may start."""
        self._is_running = not self._is_cancelled
        return self._is_running

    def set_result(self, value: Any) -> None:
        self._value = value
        self._end()

    def set_exception(self, error: BaseException) -> None:
        self._error = error
        self._end()

    def result(self, timeout: float | None = None) -> Any:
        self._wait(timeout)
        if self._error is not None:
            raise self._error
        return self._value

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._wait(timeout)
        return self._error

    def add_done_callback(self, call: Callable[[SimFuture], object]) -> None:
        if self.done():
            call(self)
        else:
            self._calls.append(call)

    def _wait(self, timeout: float | None) -> None:
        if not self.done() and not self._ended.wait(timeout):
            raise TimeoutError
        if self._is_cancelled:
            raise CancelledError

    def _end(self) -> None:
        self._ended.set()
        for call in self._calls:
            call(self)


class SimExecutor:
    """`concurrent.futures.ThreadPoolExecutor`."""

    def __init__(self, max_workers: int = 32, thread_name_prefix: str = "worker") -> None:
        self._free, self._name = max_workers, thread_name_prefix
        self._waiting: deque[tuple[SimFuture, Callable[[], object]]] = deque()
        self._is_shut = False

    def submit(self, work: Callable[..., object], /, *arguments: Any, **named: Any) -> SimFuture:
        if self._is_shut:
            raise RuntimeError("cannot schedule new futures after shutdown")
        future = SimFuture()
        self._waiting.append((future, lambda: work(*arguments, **named)))
        self._fill()
        return future

    def shutdown(self, *, wait: bool = True, cancel_futures: bool = False) -> None:  # noqa: ARG002 - none is left over
        self._is_shut = True
        while cancel_futures and self._waiting:
            self._waiting.popleft()[0].cancel()

    def _fill(self) -> None:
        node = kernel().node
        if self._free and self._waiting and node is not None:
            self._free -= 1
            node.spawn(self._work, self._name)

    def _work(self) -> None:
        while self._waiting:
            future, work = self._waiting.popleft()
            if not future.begin():
                continue
            try:
                value = work()
            except Exception as error:  # noqa: BLE001 - it is the caller's
                future.set_exception(error)
            else:
                future.set_result(value)
        self._free += 1


def run_coroutine_threadsafe(work: Any, loop: SimLoop) -> SimFuture:
    """`asyncio.run_coroutine_threadsafe`."""
    import asyncio

    future = SimFuture()

    def start() -> None:
        task = asyncio.ensure_future(work, loop=loop)
        future.cancel = task.cancel  # type: ignore[method-assign]
        task.add_done_callback(pass_on)

    def pass_on(task: asyncio.Task[Any]) -> None:
        if task.cancelled():
            future._is_cancelled = True  # noqa: SLF001 - of this module
            future._end()  # noqa: SLF001
        elif (error := task.exception()) is not None:
            future.set_exception(error)
        else:
            future.set_result(task.result())

    loop.call_soon_threadsafe(start)
    return future


class SimThreading:
    """The module `threading`."""

    Lock, RLock, Condition, Event, Thread = SimLock, SimRLock, SimCondition, SimEvent, SimThread

    def __getattr__(self, name: str) -> Any:
        return getattr(threading, name)
