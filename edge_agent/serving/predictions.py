"""The agent's side of serving: a child process that is started, told what to load, and started again when it dies.

The listening socket is held here and passed on, so the port stays ours while the child is gone, and who
asks meanwhile waits for the next one. The first is started when there is a model to load, or when somebody
connects: a device without a release stays small. Each new child is given the models that served before.
Who is to blame for a death: the model that was loading, or those that were being computed (`Board`). One
during whose loading it died twice is dropped; one that was at work in deaths soon after each other is
reported as failing. Invariant: a `prepare` ends in a `Staged`, a ProtocolError or a cancellation.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
import socket
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edge_agent.children import Child
from edge_agent.releases.trial import try_model
from edge_agent.serving import wire
from edge_agent.serving.board import Board, new_descriptor
from edgefl.errors import ProtocolError
from edgefl.logs import event

START_S = 60.0  # for a child to answer on the port; a slow device takes seconds for the imports
STOP_S = 7.0  # for requests that have begun
SOON_S = 30.0  # a death so soon after the start counts towards giving something up
MAX_LOAD_DEATHS = 2
MAX_WORK_DEATHS = 5
_BACK_OFF_S = (0.0, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)  # before the next start, by deaths soon after each other

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A release that lies whole on the disk."""

    name: str
    version: int
    path: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictionsConfig:
    """How the serving process is run."""

    memory_mb: int  # of its data, and of a trial's; 0 = no limit
    load_s: float  # for a model to load and run once
    token: str = ""  # that clients have to send; empty = none
    tls_home: str = ""  # the folder whose certificate is shown; empty = no TLS


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingCallbacks:
    """Callbacks of the serving process's supervisor. Called in the event loop."""

    serving: Callable[[bool], None]  # whether the port is served
    failing: Callable[[Model, str], None]  # this model ends the process again and again


class Staged:
    """A model that was loaded and can take over at once."""

    def __init__(self, owner: Predictions, model: Model, number: int, life: int) -> None:
        self._owner, self.model, self._number, self._life = owner, model, number, life

    def switch(self) -> None:
        """Serve it, in place of the version before it."""
        self._owner.take_over(self.model, self._number, self._life)

    def forget(self) -> None:
        """Unload this model: it will not be served."""
        self._owner.forget(self._number, self._life)


class Predictions:
    """The serving process of one agent. Used from its event loop."""

    def __init__(self, listener: socket.socket, config: PredictionsConfig, news: ServingCallbacks) -> None:
        self._listener, self._config, self._news = listener, config, news
        self._models: dict[str, Model] = {}  # what is to serve
        self._needed, self._up = asyncio.Event(), asyncio.Event()
        self._ready = False
        self._life = 0  # number of the child
        self._writer: asyncio.StreamWriter | None = None
        self._numbers = itertools.count(1)
        self._loads: dict[int, tuple[Model, asyncio.Future[None]]] = {}
        self._load_deaths: dict[Model, int] = {}
        self._work_deaths: dict[Model, int] = {}
        self._careful = False  # the last child died while it loaded: one model at a time, then
        self._child: Child | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def pid(self) -> int | None:
        """The serving process's id, while there is one."""
        return self._child.pid if self._child else None

    def versions(self) -> dict[str, int]:
        """Return what serves, or is to serve again as soon as the process is back."""
        return {name: model.version for name, model in self._models.items()}

    def set_ready(self) -> None:
        """Every release that the device holds has been loaded, or given up."""
        self._ready = True
        self._send_ready()

    async def prepare(self, model: Model, *, trial: bool) -> Staged:
        """Load a model beside what serves, in a process of its own first where `trial`; raises ProtocolError."""
        if trial:
            await try_model(
                model.name, model.version, model.path, memory_mb=self._config.memory_mb, within_s=self._config.load_s
            )
        try:
            return await self._load(model)
        except _ChildDied:  # perhaps for another reason
            return await self._load(model)

    async def _load(self, model: Model) -> Staged:
        self._needed.set()
        try:
            async with asyncio.timeout(START_S):
                await self._up.wait()
        except TimeoutError as cause:
            raise ProtocolError(f"the serving process is not up after {START_S:g} s; its log says why") from cause
        number, life = next(self._numbers), self._life
        loaded = asyncio.get_running_loop().create_future()
        self._loads[number] = (model, loaded)
        try:
            self._send(wire.Load(id=number, name=model.name, version=model.version, path=str(model.path)))
            async with asyncio.timeout(self._config.load_s):
                await loaded
        except TimeoutError as cause:
            self._end_child(f"model {model.name} version {model.version} does not load")
            raise ProtocolError(
                f"model {model.name} version {model.version} was not loaded within {self._config.load_s:g} s"
            ) from cause
        except asyncio.CancelledError:
            self.forget(number, life)
            raise
        finally:
            self._loads.pop(number, None)
        return Staged(self, model, number, life)

    def take_over(self, model: Model, number: int, life: int) -> None:
        """See `Staged.switch`."""
        self._models[model.name] = model
        if life == self._life and self._up.is_set():
            self._send(wire.Switch(id=number))
        elif self._up.is_set():  # its process died in between, and the next one has not been told of it
            self._own(self._restore([model]))

    def forget(self, number: int, life: int) -> None:
        """See `Staged.forget`."""
        if life == self._life and self._up.is_set():
            self._send(wire.Forget(id=number))

    def drop(self, name: str) -> None:
        """Stop serving a model."""
        if self._models.pop(name, None) and self._up.is_set():
            self._send(wire.Drop(name=name))

    async def run(self) -> None:
        """Keep the process running until cancelled; then end it, after the requests that have begun."""
        loop = asyncio.get_running_loop()
        soon = 0
        self._news.serving(True)  # noqa: FBT003 - a callback has no names. Who connects is answered
        try:
            while True:
                await self._wait_for_need()
                started_s = loop.time()
                at_work: set[str] = set()
                try:
                    at_work = await self._watched_life()
                except OSError as error:  # no memory, or too many processes: there may be room at the next try
                    event(_log, logging.ERROR, "serving.not_started", reason=error)
                    self._needed.set()
                early = loop.time() - started_s < SOON_S
                self._blame(at_work, early=early)
                soon = soon + 1 if early else 0
                await asyncio.sleep(_BACK_OFF_S[min(soon, len(_BACK_OFF_S) - 1)])
        finally:
            for task in self._tasks:
                task.cancel()
            self._listener.close()

    async def _wait_for_need(self) -> None:
        loop = asyncio.get_running_loop()
        if self._models:
            return
        loop.add_reader(self._listener, self._needed.set)
        try:
            await self._needed.wait()
        finally:
            loop.remove_reader(self._listener)
            self._needed.clear()

    async def _watched_life(self) -> set[str]:
        """Run the child to its end; return the models that were at work then. Raises OSError where none starts."""
        descriptor = new_descriptor()
        try:
            board = Board(descriptor)
            await self._live(descriptor)
        finally:
            os.close(descriptor)
        return board.at_work()

    async def _live(self, board: int) -> None:
        """One life of the child, from its start to its end."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                child = self._start(theirs.fileno(), board)
            except OSError:
                ours.close()
                raise
        self._child = child
        self._life += 1
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=wire.MAX_LINE_BYTES)
        level = logging.getLogger().getEffectiveLevel()
        self._send(wire.Start(log_level=level, token=self._config.token, tls_home=self._config.tls_home))
        receiving = asyncio.create_task(self._receive(reader), name="serving-process")
        overdue = asyncio.get_running_loop().call_later(START_S, self._check_up, child)
        try:
            await child.ended.wait()
        except asyncio.CancelledError:
            # In a task of its own: up to Python 3.11.2, time limits do not hold in one that is being cancelled.
            with suppress(TimeoutError):  # it was killed then: a computation in a kernel hears no signal
                await asyncio.shield(asyncio.create_task(child.stop(STOP_S)))
            raise
        finally:
            overdue.cancel()
            receiving.cancel()
            self._writer.close()
            self._child = None
            if self._up.is_set():
                self._up.clear()
                self._news.serving(False)  # noqa: FBT003 - a callback has no names
        event(_log, logging.ERROR, "serving.ended", pid=child.pid, how=child.end)

    def _start(self, control: int, board: int) -> Child:
        listener = self._listener.fileno()
        options = (f"--control={control}", f"--listen={listener}", f"--board={board}")
        memory = f"--memory-mb={self._config.memory_mb}"
        return Child("edge_agent.serving.serving_main", *options, memory, descriptors=(control, listener, board))

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        with suppress(OSError):  # the process died; `_live` sees to it
            while (text := await reader.readline()).endswith(b"\n"):  # the last one may be half: it died
                self._take(wire.parse(text))

    def _take(self, message: wire.Message) -> None:
        match message:
            case wire.Up():
                event(_log, logging.INFO, "serving.up", pid=message.pid)
                self._up.set()
                self._news.serving(True)  # noqa: FBT003 - a callback has no names
                self._own(self._restore(list(self._models.values())))
            case wire.Loaded():
                _, loaded = self._loads.get(message.id, (None, None))
                if loaded is not None and not loaded.done():
                    if message.error:
                        loaded.set_exception(ProtocolError(message.error))
                    else:
                        loaded.set_result(None)
            case wire.Stuck():
                self._end_child(f"a computation of model {message.model} does not end")
            case _:
                raise ProtocolError(f"the serving process said {message}")

    async def _restore(self, models: list[Model]) -> None:
        """Have a new child serve what the one before it served."""
        life = self._life
        if self._careful:
            for model in models:
                if life == self._life and self._up.is_set():
                    await self._load_again(model)
        else:
            await asyncio.gather(*(self._load_again(model) for model in models))
        if life == self._life:
            self._send_ready()

    async def _load_again(self, model: Model) -> None:
        if self._models.get(model.name) != model:
            return
        try:
            staged = await self._load(model)
        except _ChildDied:
            return  # the next one is given it too
        except ProtocolError as error:
            self._give_up(model, str(error))
            return
        if self._models.get(model.name) == model:
            staged.switch()
        else:
            staged.forget()

    def _blame(self, at_work: set[str], *, early: bool) -> None:
        loading = [(model, loaded) for model, loaded in self._loads.values() if not loaded.done()]
        for _, loaded in loading:
            loaded.set_exception(_ChildDied("the serving process died while it loaded this model"))
        self._careful = bool(loading)
        if len(loading) == 1:
            self._count(self._load_deaths, loading[0][0], MAX_LOAD_DEATHS, "while it loaded")
        computing = [model for name, model in self._models.items() if name in at_work]
        if not early:
            self._work_deaths.clear()
        elif not loading:
            for model in computing:
                self._count(self._work_deaths, model, MAX_WORK_DEATHS, "soon after its start, at work on")

    def _count(self, deaths: dict[Model, int], model: Model, most: int, when: str) -> None:
        deaths[model] = deaths.get(model, 0) + 1
        if deaths[model] < most:
            return
        deaths.pop(model)
        reason = f"the serving process died {most} times {when} model {model.name} version {model.version}"
        if deaths is self._load_deaths:
            self._give_up(model, reason)
        else:
            self._news.failing(model, reason)

    def _give_up(self, model: Model, reason: str) -> None:
        if self._models.get(model.name) == model:
            self.drop(model.name)
            self._news.failing(model, reason)

    def _check_up(self, child: Child) -> None:
        if not self._up.is_set():
            event(_log, logging.ERROR, "serving.not_up", pid=child.pid, within_s=START_S)
            child.signal(signal.SIGKILL)

    def _end_child(self, reason: str) -> None:
        if self._child is not None:
            event(_log, logging.ERROR, "serving.killed", pid=self._child.pid, reason=reason)
            self._child.signal(signal.SIGKILL)

    def _own(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work, name="load again")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def admit_anew(self) -> None:
        """Have clients shake hands again: the list of revoked certificates has changed."""
        if self._up.is_set():
            self._send(wire.AdmitAnew())

    def _send_ready(self) -> None:
        if self._up.is_set():
            self._send(wire.Ready(ready=self._ready))

    def _send(self, message: wire.Message) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(wire.line(message))


class _ChildDied(ProtocolError):
    """The serving process ended before it had loaded the model."""
