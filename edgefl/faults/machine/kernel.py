"""The scheduler of a simulation: nodes with an event loop and threads each, one virtual clock, one seed for all order.

Everything runs in one thread of the operating system. A node's event loop runs its callbacks in order, as asyncio does;
its threads are fibers (greenlets) that give way where real threads wait, and at times where they take a lock. Between
nodes, and between a node's loop and its threads, the seed decides who is next. Time moves only when nobody can run.
The manner is that of FoundationDB's simulation (Zhou et al. 2021, SIGMOD, section 4).

Invariant: the same seed and the same calls give the same order, whatever the machine does.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import greenlet

PREEMPTED = 0.05  # how often a thread that takes a lock lets others run first
BURST = 12  # callbacks of one event loop in a row, at most
_MAX_STEPS = 150_000
_TICK_S = 1e-6
_MAX_CLOSES = 20


class Killed(BaseException):
    """The node was killed: unwinds its fibers, and no code that handles errors sees it."""


class Stuck(RuntimeError):
    """The simulated program waits in a way that would stop its event loop for ever."""


class Fiber:
    """A simulated thread."""

    def __init__(self, node: Node, work: Callable[[], object], name: str) -> None:
        self.node, self.name = node, name
        self.is_done = False
        self.waits_for: Any = None  # a lock, if it waits for one
        self.timed_out = False
        self._timer: list[Any] | None = None
        self.greenlet = greenlet.greenlet(lambda: self._run(work), parent=node.kernel.main)
        self.on_end: list[Callable[[], None]] = []

    def _run(self, work: Callable[[], object]) -> None:
        try:
            if self.node.is_alive:
                work()
        except (Killed, greenlet.GreenletExit):
            pass
        except BaseException as error:  # noqa: BLE001 - the thread's outermost line
            self.node.kernel.report(f"thread {self.name} of {self.node.name} raised {error!r}", error)
        finally:
            self.is_done = True
            for call in self.on_end:
                call()


class SimLoop(asyncio.BaseEventLoop):
    """A node's event loop. It has no selector: the kernel runs its callbacks."""

    _ready: deque[Any]  # asyncio's own: handles
    _scheduled: list[Any]  # asyncio's own: a heap of timers

    def __init__(self, node: Node) -> None:
        super().__init__()
        self._node = node
        self._thread_id = threading.get_ident()  # it counts as running
        self.executor: Any = None  # set by `edgefl.faults.machine.threads`

    def time(self) -> float:
        return self._node.kernel.now_s

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # type: ignore[override]
        done: asyncio.Future[Any] = self.create_future()

        def pass_on(ended: Any) -> None:
            if done.cancelled() or not self._node.is_alive:
                return
            if (error := ended.exception()) is not None:
                done.set_exception(error)
            else:
                done.set_result(ended.result())

        running = (executor or self.executor).submit(func, *args)
        running.add_done_callback(lambda ended: self.call_soon(pass_on, ended))
        return done

    def set_default_executor(self, executor: Any) -> None:
        """Keep the simulated one."""

    def add_signal_handler(self, sig: int, callback: Any, *args: Any) -> None:  # type: ignore[override]
        """Signals are not simulated: a node ends by a kill."""

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if self._node.is_alive and not isinstance(error, Killed):
            self._node.kernel.report(f"event loop of {self._node.name}: {context.get('message')}: {error!r}", error)

    def _write_to_self(self) -> None:
        pass

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass

    @property
    def has_ready(self) -> bool:
        return bool(self._ready)

    def take_due(self, now_s: float) -> None:
        """Make the timers ready whose time has come."""
        timers = self._scheduled
        while timers and timers[0]._when <= now_s:  # noqa: SLF001 - asyncio's own field
            handle = heapq.heappop(timers)
            handle._scheduled = False  # noqa: SLF001
            if not handle._cancelled:  # noqa: SLF001
                self._ready.append(handle)

    def next_timer_s(self) -> float | None:
        timers = self._scheduled
        while timers and timers[0]._cancelled:  # noqa: SLF001
            heapq.heappop(timers)._scheduled = False  # noqa: SLF001
        return timers[0]._when if timers else None  # noqa: SLF001

    def run_next(self) -> None:
        handle = self._ready.popleft()
        if not handle._cancelled:  # noqa: SLF001
            handle._run()  # noqa: SLF001

    def drop(self) -> None:
        """Forget all callbacks."""
        self._ready.clear()
        self._scheduled.clear()
        self._thread_id = 0
        self._closed = True


class Node:
    """One process of the simulation, from its start to its kill."""

    def __init__(self, kernel: Kernel, name: str, home: Path) -> None:
        self.kernel, self.name, self.home = kernel, name, home
        self.is_alive = True
        self.paused_until_s = 0.0
        self.wall_offset_s = 0.0
        self.disk_full_until_s = 0.0
        self.ready: deque[Fiber] = deque()
        self.fibers: list[Fiber] = []
        self.tasks: list[asyncio.Task[Any]] = []
        self.connections: list[Any] = []  # of its databases
        self.on_kill: list[Callable[[], None]] = []
        self.loop = SimLoop(self)
        self.loop.set_task_factory(self._new_task)
        kernel.nodes.append(self)

    def _new_task(self, loop: asyncio.AbstractEventLoop, work: Any, **named: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(work, loop=loop, **named)
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # noqa: SLF001 - it dies with its node
        self.tasks.append(task)
        return task

    def spawn(self, work: Callable[[], object], name: str) -> Fiber:
        """Start a thread."""
        fiber = Fiber(self, work, name)
        self.fibers.append(fiber)
        self.ready.append(fiber)
        return fiber

    @property
    def is_disk_full(self) -> bool:
        return self.kernel.now_s < self.disk_full_until_s

    @property
    def in_transaction(self) -> bool:
        return any(one.in_transaction for one in self.connections)


class Kernel:
    """The nodes, the clock and the order."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.order = random.Random(f"{seed}/order")
        self.now_s = 0.0
        self.num_steps = 0
        self.main = greenlet.getcurrent()
        self.nodes: list[Node] = []
        self.node: Node | None = None  # whose code runs
        self.fiber: Fiber | None = None  # that runs; None = an event loop
        self.problems: list[str] = []
        self.on_problem: Callable[[str, BaseException | None], None] = lambda _text, _error: None
        self._graveyard: list[Node] = []
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()

    def report(self, text: str, error: BaseException | None = None) -> None:
        """Note that the program did what it never may."""
        self.problems.append(f"{self.now_s:.3f} s: {text}")
        self.on_problem(text, error)

    def call_at(self, when_s: float, call: Callable[[], None]) -> None:
        """Call at a time, outside of all nodes."""
        heapq.heappush(self._timers, (when_s, next(self._count), call))

    def call_in(self, node: Node, call: Callable[[], object]) -> None:
        """Call in a node's event loop."""
        if node.is_alive:
            node.loop.call_soon(call)

    def run(self, is_over: Callable[[], bool], limit_s: float) -> bool:
        """Run until it is over; False if the time limit, or the end of all events, comes first."""
        try:
            while not is_over():
                if not self._step() and not self._advance(limit_s):
                    return False
        finally:
            asyncio._set_running_loop(None)  # noqa: SLF001 - as each event loop does
            self.node = self.fiber = None
        return True

    def _step(self) -> bool:
        able = [one for one in self.nodes
                if one.paused_until_s <= self.now_s and (one.ready or one.loop.has_ready)]  # fmt: skip
        if not able:
            return False
        self.num_steps += 1
        if self.num_steps > _MAX_STEPS:
            raise Stuck(f"{_MAX_STEPS} steps without an end, at {self.now_s:.3f} s")
        node = able[self.order.randrange(len(able))] if len(able) > 1 else able[0]
        choices = len(node.ready) + node.loop.has_ready
        pick = self.order.randrange(choices) if choices > 1 else 0
        self.node = node
        asyncio._set_running_loop(node.loop)  # noqa: SLF001
        if pick < len(node.ready):
            fiber = node.ready[pick]
            del node.ready[pick]
            self.resume(fiber)
        else:
            for _ in range(self.order.randint(1, BURST)):
                if not node.is_alive or not node.loop.has_ready:
                    break
                node.loop.run_next()
        return True

    def _advance(self, limit_s: float) -> bool:
        """Move the clock to the next event; False if there is none before the limit."""
        times = [self._timers[0][0]] if self._timers else []
        for node in self.nodes:
            when_s = self.now_s if node.ready or node.loop.has_ready else node.loop.next_timer_s()
            if when_s is not None:
                times.append(max(when_s, node.paused_until_s))
        if not times or (now_s := min(times)) > limit_s:
            return False
        self.now_s = max(self.now_s, now_s)
        while self._timers and self._timers[0][0] <= self.now_s:
            heapq.heappop(self._timers)[2]()
        for node in self.nodes:
            if node.paused_until_s <= self.now_s:
                node.loop.take_due(self.now_s)
        return True

    # Of fibers.

    def resume(self, fiber: Fiber) -> None:
        """Run a fiber until it waits or ends."""
        before, self.fiber = self.fiber, fiber
        try:
            fiber.greenlet.switch()
        finally:
            self.fiber = before

    def wake(self, fiber: Fiber) -> None:
        """Let a waiting fiber run on."""
        if fiber.node.is_alive and fiber not in fiber.node.ready:
            fiber.node.ready.append(fiber)

    def wait(self, waits_for: Any = None, timeout_s: float | None = None) -> bool:
        """Let the running fiber wait until it is woken; False if the time is over first."""
        fiber = self.fiber
        if fiber is None:
            raise Stuck(f"the event loop of {self.node.name if self.node else '?'} waits in a blocking call")
        self.check_alive(fiber)
        fiber.waits_for, fiber.timed_out = waits_for, False
        turn = [fiber]
        if timeout_s is not None:
            # Time passes in every wait, or a wait for the rest of a rounded duration would never end.
            self.call_at(self.now_s + max(_TICK_S, timeout_s), lambda: self._time_out(turn))
        self._leave(fiber)
        turn.clear()
        fiber.waits_for = None
        return not fiber.timed_out

    def _time_out(self, turn: list[Fiber]) -> None:
        if turn and turn[0] not in turn[0].node.ready:
            turn[0].timed_out = True
            self.wake(turn[0])

    def give_way(self) -> None:
        """At times let others run before the running fiber goes on."""
        fiber = self.fiber
        if fiber is None:
            return
        self.check_alive(fiber)
        if self.order.random() < PREEMPTED and not fiber.node.in_transaction:
            fiber.node.ready.append(fiber)
            self._leave(fiber)

    def _leave(self, fiber: Fiber) -> None:
        self.main.switch()
        self.check_alive(fiber)

    def check_alive(self, fiber: Fiber | None = None) -> None:
        """Raise Killed in code of a node that was killed."""
        node = fiber.node if fiber is not None else self.node
        if node is not None and not node.is_alive:
            raise Killed

    def run_holder(self, holder: Any) -> None:
        """Run the fiber that holds a lock which an event loop waits for."""
        while isinstance(holder, Fiber) and holder.waits_for is not None and holder not in holder.node.ready:
            holder = holder.waits_for.holder
        if not isinstance(holder, Fiber) or holder not in holder.node.ready:
            raise Stuck(f"the event loop waits for a lock whose holder {holder!r} waits, too")
        holder.node.ready.remove(holder)
        self.resume(holder)

    def kill(self, node: Node) -> None:
        """End a node as `kill -9` does: none of its code runs any more."""
        node.is_alive = False
        self.nodes.remove(node)
        self._graveyard.append(node)
        for call in node.on_kill:
            call()

    def close(self) -> None:
        """Unwind what is left of all nodes; what that does is no part of the simulation."""
        self.on_problem = lambda _text, _error: None
        for node in list(self.nodes):
            self.kill(node)
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of coroutines that never began
                for node in self._graveyard:
                    self._bury(node)
        finally:
            sys.unraisablehook = hook
            asyncio._set_running_loop(None)  # noqa: SLF001
        self.node = None
        self._timers.clear()

    def _bury(self, node: Node) -> None:
        self.node = node
        asyncio._set_running_loop(node.loop)  # noqa: SLF001
        for fiber in node.fibers:
            self.fiber = fiber
            while not fiber.is_done:
                if fiber.greenlet:
                    fiber.greenlet.throw(Killed)
                else:
                    fiber.is_done = True
        self.fiber = None
        for task in node.tasks:
            if not task.done():
                _close(task.get_coro())
        node.tasks.clear()
        node.fibers.clear()
        node.on_kill.clear()
        node.loop.drop()
        for connection in node.connections:
            connection.shut()
        node.connections.clear()


def _close(work: Any) -> None:
    """Close a coroutine, however often its cleanup waits for something."""
    for _ in range(_MAX_CLOSES):
        try:
            work.close()
        except RuntimeError:  # it waits again
            continue
        except BaseException:  # noqa: BLE001, S110 - cleanup of a process that is dead
            pass
        return
