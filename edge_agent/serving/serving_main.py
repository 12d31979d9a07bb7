"""The serving process: it has the port and the models, so that a crash in a model does not affect the agent.

    python -P -m edge_agent.serving.serving_main --control N --listen N --board N --memory-mb N

A child of the agent, controlled by messages (`edge_agent.serving.wire`); it exits when the agent does. Its memory is
limited, and the kernel kills it before the agent if the machine runs out of memory. Each model is loaded in a separate
thread, while others are served.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import resource
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_agent.generation.proxy import GenerationProxy
from edge_agent.serving import wire
from edge_agent.serving.access import server_contexts
from edge_agent.serving.api import Serving
from edge_agent.serving.board import Board
from edge_agent.sessions import LoadedModel, Models, load
from edgefl.errors import EdgeflError, ProtocolError
from edgefl.logs import set_up_logging
from edgefl.process.children import die_with_parent, limit_own_memory
from edgefl.protocols.inference.placement import DEVICE

if TYPE_CHECKING:
    from edge_agent.placement.serving import PlacedServing


_log = logging.getLogger(__name__)


class ServingProcess:
    """Executes the agent's commands while it serves predictions."""

    def __init__(self, control: socket.socket, listener: socket.socket, board: Board) -> None:
        self._control, self._listener = control, listener
        self._models, self._board = Models(), board
        self._loaded: dict[int, LoadedModel | PlacedServing] = {}
        self._keepers: dict[str, asyncio.Task[None]] = {}  # by placed model
        self._loading: set[int] = set()

    async def run(self) -> None:
        """Serve until SIGTERM; requests in progress are answered first."""
        reader, self._writer = await asyncio.open_connection(sock=self._control, limit=wire.MAX_LINE_BYTES)
        self._loop = asyncio.get_running_loop()
        serving = asyncio.create_task(self._serve(reader), name="serving")
        self._loop.add_signal_handler(signal.SIGTERM, serving.cancel)
        await asyncio.wait([serving])
        if not serving.cancelled():
            serving.result()

    async def _serve(self, reader: asyncio.StreamReader) -> None:
        first = wire.parse(await reader.readline())
        if not isinstance(first, wire.StartServing):
            raise ProtocolError(f"the agent's first message is {type(first).__name__}; expected StartServing")
        set_up_logging(first.log_level)
        self._serving = Serving(self._models, self._listener, self._board)
        self._serving.token = first.token
        self._serving.context = server_contexts(Path(first.tls_home)) if first.tls_home else None
        self._tail = wire.TailAccess(**first.tail)
        self._serving.generation = GenerationProxy(first.generation)
        self._serving.on_stuck = lambda model: self._send(wire.ModelStuck(model=model))
        receiving = asyncio.create_task(self._receive(reader), name="agent")
        self._send(wire.ServingUp(pid=os.getpid()))
        try:
            await self._serving.run()
        finally:
            receiving.cancel()
            for keeper in self._keepers.values():
                keeper.cancel()
            await asyncio.gather(*self._keepers.values(), return_exceptions=True)

    async def _receive(self, reader: asyncio.StreamReader) -> None:
        while text := await reader.readline():
            self._handle(wire.parse(text))
        os._exit(0)  # the agent is gone, and a computation may never return

    def _handle(self, message: wire.Message) -> None:
        match message:
            case wire.LoadModel():
                self._loading.add(message.id)
                thread = threading.Thread(target=self._load, args=(message,), name=f"load-{message.id}", daemon=True)
                thread.start()
            case wire.SwitchModel() if message.id in self._loaded:
                self._switch(self._loaded.pop(message.id))
            case wire.ForgetModel():
                self._loaded.pop(message.id, None)
                self._loading.discard(message.id)
            case wire.DropModel():
                self._models.drop(message.name)
                self._drop_placed(message.name)
            case wire.SetReady():
                self._serving.ready = message.ready
            case wire.SetGeneration():
                self._serving.generation = GenerationProxy(message.address)
            case wire.DisconnectClients():
                self._serving.disconnect_clients()
            case _:
                raise ProtocolError(f"unexpected message from the agent: {message}")

    def _switch(self, loaded: LoadedModel | PlacedServing) -> None:
        """Serve a loaded model instead of the one of its name."""
        self._drop_placed(loaded.name)
        if isinstance(loaded, LoadedModel):
            self._models.put(loaded)
            self._tell(loaded.name, loaded.version, {}, {DEVICE: 1e3 * loaded.run_s})
            return
        self._models.drop(loaded.name)
        self._serving.placed[loaded.name] = loaded.model
        keeper = loaded.keeper(self._serving.compute, self._tell)
        self._keepers[loaded.name] = self._loop.create_task(keeper.run(), name=f"placement-{loaded.name}")
        self._keepers[loaded.name].add_done_callback(_look_at_end)

    def _drop_placed(self, name: str) -> None:
        self._serving.placed.pop(name, None)
        if (keeper := self._keepers.pop(name, None)) is not None:
            keeper.cancel()

    def _tell(self, model: str, version: int, facts: dict[str, Any], profile_ms: dict[str, float]) -> None:
        self._send(wire.PlacementNote(model=model, version=version, facts=facts, profile_ms=profile_ms))

    def _load(self, request: wire.LoadModel) -> None:
        """Load a model; runs in a thread, as ONNX Runtime releases the GIL."""
        try:
            served: LoadedModel | PlacedServing
            if request.placed:
                from edge_agent.placement.serving import load_serving  # lazy: loads gRPC

                served = load_serving(request, self._tail)
            else:
                sample = Path(request.sample) if request.sample else None
                served = load(request.name, request.version, Path(request.path), sample)
        except (EdgeflError, OSError) as error:
            self._loop.call_soon_threadsafe(self._keep, request.id, None, str(error) or type(error).__name__)
        else:
            self._loop.call_soon_threadsafe(self._keep, request.id, served, "")

    def _keep(self, number: int, served: LoadedModel | PlacedServing | None, error: str) -> None:
        if number in self._loading:
            self._loading.discard(number)
            if served is not None:
                self._loaded[number] = served
            self._send(wire.ModelLoaded(id=number, error=error[: wire.MAX_ERROR_CHARS]))

    def _send(self, message: wire.Message) -> None:
        self._writer.write(wire.line(message))


def _look_at_end(keeper: asyncio.Task[None]) -> None:
    """A keeper that failed, which is a bug, ends the process: the agent starts the next one."""
    if not keeper.cancelled() and (error := keeper.exception()) is not None:
        _log.critical("serving.keeper_failed", exc_info=error)
        os._exit(1)


def main() -> None:
    """Run as the agent's child."""
    parser = argparse.ArgumentParser(prog="edgefl-serving", description="The agent's serving process.")
    for name in ("control", "listen", "board"):
        parser.add_argument(f"--{name}", type=int, required=True, help="a descriptor that the agent passes")
    parser.add_argument("--memory-mb", type=int, default=0, help="memory limit; 0 = none")
    arguments = parser.parse_args()
    die_with_parent()
    limit_own_memory(arguments.memory_mb)
    _raise_descriptors()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_up_logging(logging.INFO)
    board = Board(arguments.board)
    os.close(arguments.board)
    control, listener = socket.socket(fileno=arguments.control), socket.socket(fileno=arguments.listen)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(ServingProcess(control, listener, board).run())


def _raise_descriptors() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    if sys.platform == "win32":
        return None
    try:
        import uvloop
    except ImportError:  # no wheel for this machine: use asyncio's slower loop
        return None
    return uvloop.Loop


if __name__ == "__main__":
    main()
