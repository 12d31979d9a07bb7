"""The agent's side of serving: starts the serving process, tells it what to load, and restarts it when it dies.

The listening socket is held here and passed to the child, so the port stays open without a child, and clients wait
for the next one. The first child is started with the first model, or when a client connects: a device without a
release uses little memory. A new child loads the models that were served before.
A death is attributed to the model that was being loaded, or to those that were running (`Board`). A model is dropped
after two deaths while it was loaded; one that was running in several deaths in close succession is reported as failing.
Invariant: `prepare` ends with a `StagedModel`, a ProtocolError or a cancellation.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import os
import signal
import socket
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field

from edge_agent.releases.model_file import ModelFile
from edge_agent.releases.trial import try_model
from edge_agent.serving import wire
from edge_agent.serving.board import Board, new_descriptor
from edgefl.errors import ProtocolError
from edgefl.logs import event
from edgefl.process.children import Child

START_S = 60.0  # for a child to start; on a slow device the imports take seconds
STOP_S = 7.0  # for requests in progress
SOON_S = 30.0  # a death this soon after the start counts against the models involved
MAX_LOAD_DEATHS = 2
MAX_WORK_DEATHS = 5
_BACK_OFF_S = (
    0.0,
    0.2,
    0.5,
    1.0,
    2.0,
    5.0,
    10.0,
    30.0,
)  # before the next start, by the number of deaths in close succession

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingConfig:
    """How to run the serving process."""

    memory_mb: int  # limit for it, and for a trial; 0 = no limit
    load_s: float  # time limit to load a model and run it once
    token: str = ""  # that clients must send; empty = none
    tls_home: str = ""  # home with the certificate to present; empty = no TLS
    tail: wire.TailAccess = field(default_factory=wire.TailAccess)  # how stage servers are reached
    generation: str = ""  # address of the generation process; empty = there is no language model


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingCallbacks:
    """Callbacks of the serving process's supervisor. Called in the event loop."""

    serving: Callable[[bool], None]  # whether the port is served
    failing: Callable[[ModelFile, str], None]  # this model crashes the process repeatedly
    placed: Callable[[wire.PlacementNote], None] = lambda _: None  # how a model is placed now, and what it measured


class StagedModel:
    """A loaded model that is not served yet."""

    def __init__(self, owner: ServingSupervisor, model: ModelFile, number: int, life: int) -> None:
        self._owner, self.model, self._number, self._life = owner, model, number, life

    def switch(self) -> None:
        """Serve this model instead of the previous version."""
        self._owner.take_over(self.model, self._number, self._life)

    def forget(self) -> None:
        """Unload this model: it will not be served."""
        self._owner.forget(self._number, self._life)


class ServingSupervisor:
    """Supervises the serving process of one agent. Used from its event loop."""

    def __init__(self, listener: socket.socket, config: ServingConfig, callbacks: ServingCallbacks) -> None:
        self._listener, self._config, self._callbacks = listener, config, callbacks
        self._models: dict[str, ModelFile] = {}  # the models to serve
        self._needed, self._up = asyncio.Event(), asyncio.Event()
        self._ready = False
        self._life = 0  # number of the child
        self._writer: asyncio.StreamWriter | None = None
        self._numbers = itertools.count(1)
        self._loads: dict[int, tuple[ModelFile, asyncio.Future[None]]] = {}
        self._load_deaths: dict[ModelFile, int] = {}
        self._work_deaths: dict[ModelFile, int] = {}
        self._careful = False  # load one model at a time, because the last child died while it loaded models
        self._child: Child | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def pid(self) -> int | None:
        """The serving process's id; None if there is none."""
        return self._child.pid if self._child else None

    def versions(self) -> dict[str, int]:
        """Return the models being served, or to be served again after a restart."""
        return {name: model.version for name, model in self._models.items()}

    def set_ready(self) -> None:
        """Report readiness: every installed release has been loaded or has failed."""
        self._ready = True
        self._send_ready()

    async def prepare(self, model: ModelFile, *, trial: bool) -> StagedModel:
        """Load a model while others are served, with `trial` in a separate process first; raises ProtocolError."""
        if trial:
            await try_model(
                model.name, model.version, model.files(), memory_mb=self._config.memory_mb,
                within_s=self._config.load_s,
            )  # fmt: skip
        try:
            return await self._load(model)
        except _ChildDied:  # possibly for another reason
            return await self._load(model)

    async def _load(self, model: ModelFile) -> StagedModel:
        self._needed.set()
        try:
            async with asyncio.timeout(START_S):
                await self._up.wait()
        except TimeoutError as cause:
            raise ProtocolError(
                f"the serving process did not start within {START_S:g} s; see the agent's log"
            ) from cause
        number, life = next(self._numbers), self._life
        loaded = asyncio.get_running_loop().create_future()
        self._loads[number] = (model, loaded)
        try:
            sample = "" if model.sample is None else str(model.sample)
            self._send(
                wire.LoadModel(
                    id=number, name=model.name, version=model.version, path=str(model.path), sample=sample,
                    placed=model.placed,
                )
            )  # fmt: skip
            async with asyncio.timeout(self._config.load_s):
                await loaded
        except TimeoutError as cause:
            self._kill_child(f"model {model.name} version {model.version} takes too long to load")
            raise ProtocolError(
                f"model {model.name} version {model.version} was not loaded within {self._config.load_s:g} s"
            ) from cause
        except asyncio.CancelledError:
            self.forget(number, life)
            raise
        finally:
            self._loads.pop(number, None)
        return StagedModel(self, model, number, life)

    def take_over(self, model: ModelFile, number: int, life: int) -> None:
        """See `StagedModel.switch`."""
        self._models[model.name] = model
        if life == self._life and self._up.is_set():
            self._send(wire.SwitchModel(id=number))
        elif self._up.is_set():  # its process died in the meantime, and the next one has not loaded it
            self._own(self._restore([model]))

    def forget(self, number: int, life: int) -> None:
        """See `StagedModel.forget`."""
        if life == self._life and self._up.is_set():
            self._send(wire.ForgetModel(id=number))

    def drop(self, name: str) -> None:
        """Stop serving a model."""
        if self._models.pop(name, None) and self._up.is_set():
            self._send(wire.DropModel(name=name))

    async def run(self) -> None:
        """Keep the process running until cancelled; then stop it after the requests in progress."""
        loop = asyncio.get_running_loop()
        soon = 0
        self._callbacks.serving(True)  # noqa: FBT003 - a callback has no names. A connection starts the process
        try:
            while True:
                await self._wait_for_need()
                started_s = loop.time()
                running: set[str] = set()
                try:
                    running = await self._run_child()
                except OSError as error:  # no memory, or too many processes: the next attempt may succeed
                    event(_log, logging.ERROR, "serving.not_started", reason=error)
                    self._needed.set()
                early = loop.time() - started_s < SOON_S
                self._blame(running, early=early)
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

    async def _run_child(self) -> set[str]:
        """Run a child until it dies; return the models that ran at that time. Raises OSError if it cannot start."""
        descriptor = new_descriptor()
        try:
            board = Board(descriptor)
            await self._supervise(descriptor)
        finally:
            os.close(descriptor)
        return board.running()

    async def _supervise(self, board: int) -> None:
        """Start a child and handle its messages until it dies."""
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
        self._send(wire.StartServing(log_level=level, token=self._config.token, tls_home=self._config.tls_home,
                   tail=dataclasses.asdict(self._config.tail), generation=self._config.generation))  # fmt: skip
        receiving = asyncio.create_task(self._receive(reader), name="serving-process")
        overdue = asyncio.get_running_loop().call_later(START_S, self._check_up, child)
        try:
            await child.ended.wait()
        except asyncio.CancelledError:
            # In a separate task: up to Python 3.11.2, asyncio.timeout does not work in a task that is being cancelled.
            with suppress(TimeoutError):  # then it was killed: a running kernel does not react to SIGTERM
                await asyncio.shield(asyncio.create_task(child.stop(STOP_S)))
            raise
        finally:
            overdue.cancel()
            receiving.cancel()
            self._writer.close()
            self._child = None
            if self._up.is_set():
                self._up.clear()
                self._callbacks.serving(False)  # noqa: FBT003 - a callback has no names
        event(_log, logging.ERROR, "serving.ended", pid=child.pid, how=child.end)

    def _start(self, control: int, board: int) -> Child:
        listener = self._listener.fileno()
        options = (f"--control={control}", f"--listen={listener}", f"--board={board}")
        memory = f"--memory-mb={self._config.memory_mb}"
        return Child("edge_agent.serving.serving_main", *options, memory, descriptors=(control, listener, board))

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        with suppress(OSError):  # the process died; `_supervise` handles it
            while (text := await reader.readline()).endswith(b"\n"):  # an incomplete last line: it died
                self._handle(wire.parse(text))

    def _handle(self, message: wire.Message) -> None:
        match message:
            case wire.ServingUp():
                event(_log, logging.INFO, "serving.up", pid=message.pid)
                self._up.set()
                self._callbacks.serving(True)  # noqa: FBT003 - a callback has no names
                self._own(self._restore(list(self._models.values())))
            case wire.ModelLoaded():
                _, loaded = self._loads.get(message.id, (None, None))
                if loaded is not None and not loaded.done():
                    if message.error:
                        loaded.set_exception(ProtocolError(message.error))
                    else:
                        loaded.set_result(None)
            case wire.PlacementNote():
                self._callbacks.placed(message)
            case wire.ModelStuck():
                self._kill_child(f"a computation of model {message.model} cannot be stopped")
            case _:
                raise ProtocolError(f"unexpected message from the serving process: {message}")

    async def _restore(self, models: list[ModelFile]) -> None:
        """Load and serve models in a new child."""
        life = self._life
        if self._careful:
            for model in models:
                if life == self._life and self._up.is_set():
                    await self._load_again(model)
        else:
            await asyncio.gather(*(self._load_again(model) for model in models))
        if life == self._life:
            self._send_ready()

    async def _load_again(self, model: ModelFile) -> None:
        if self._models.get(model.name) != model:
            return
        try:
            staged = await self._load(model)
        except _ChildDied:
            return  # the next child loads it
        except ProtocolError as error:
            self._give_up(model, str(error))
            return
        if self._models.get(model.name) == model:
            staged.switch()
        else:
            staged.forget()

    def _blame(self, running: set[str], *, early: bool) -> None:
        """Attribute the death of a child to models."""
        loading = [(model, loaded) for model, loaded in self._loads.values() if not loaded.done()]
        for _, loaded in loading:
            loaded.set_exception(_ChildDied("the serving process died while it loaded this model"))
        self._careful = bool(loading)
        if len(loading) == 1:
            self._count(self._load_deaths, loading[0][0], MAX_LOAD_DEATHS, "while it loaded")
        computing = [model for name, model in self._models.items() if name in running]
        if not early:
            self._work_deaths.clear()
        elif not loading:
            for model in computing:
                self._count(self._work_deaths, model, MAX_WORK_DEATHS, "soon after its start, while it ran")

    def _count(self, deaths: dict[ModelFile, int], model: ModelFile, most: int, when: str) -> None:
        deaths[model] = deaths.get(model, 0) + 1
        if deaths[model] < most:
            return
        deaths.pop(model)
        reason = f"the serving process died {most} times {when} model {model.name} version {model.version}"
        if deaths is self._load_deaths:
            self._give_up(model, reason)
        else:
            self._callbacks.failing(model, reason)

    def _give_up(self, model: ModelFile, reason: str) -> None:
        if self._models.get(model.name) == model:
            self.drop(model.name)
            self._callbacks.failing(model, reason)

    def _check_up(self, child: Child) -> None:
        if not self._up.is_set():
            event(_log, logging.ERROR, "serving.not_up", pid=child.pid, within_s=START_S)
            child.signal(signal.SIGKILL)

    def _kill_child(self, reason: str) -> None:
        if self._child is not None:
            event(_log, logging.ERROR, "serving.killed", pid=self._child.pid, reason=reason)
            self._child.signal(signal.SIGKILL)

    def _own(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work, name="reload-models")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def set_generation(self, address: str) -> None:
        """Have texts generated by the process at this address."""
        self._config = dataclasses.replace(self._config, generation=address)
        if self._up.is_set():
            self._send(wire.SetGeneration(address=address))

    def disconnect_clients(self) -> None:
        """Disconnect all clients, because the list of revoked certificates has changed."""
        if self._up.is_set():
            self._send(wire.DisconnectClients())

    def _send_ready(self) -> None:
        if self._up.is_set():
            self._send(wire.SetReady(ready=self._ready))

    def _send(self, message: wire.Message) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(wire.line(message))


class _ChildDied(ProtocolError):
    """The serving process died before it had loaded the model."""
