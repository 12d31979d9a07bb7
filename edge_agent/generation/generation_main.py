"""The generation process: a language model's head, and OpenAI's API for the serving process.

    python -P -m edge_agent.generation.generation_main --listen N --control N --folder DIR [...]

A child of the agent; it exits when the agent does. A stage that cannot be used here, for example for too little
memory, is answered with the reason.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from edge_agent.generation import wire
from edge_agent.generation.endpoint import OpenAiEndpoint, TextModel
from edge_agent.generation.generator import Generator
from edge_agent.generation.memory import check_memory
from edge_agent.generation.tail_link import TailAddress, TailLink
from edge_agent.generation.text import TextCodec
from edgefl.errors import EdgeflError, ProtocolError
from edgefl.logs import event, set_up_logging
from edgefl.offload.generation.blocks import numpy_engine
from edgefl.offload.generation.generate import load_part
from edgefl.offload.generation.stage_info import check_first, read_stage
from edgefl.process.children import die_with_parent, limit_own_memory

READ_S = 30.0  # time limit to receive a request from the serving process
LOADING_S = 30.0  # a request waits so long while the model is loaded

_log = logging.getLogger(__name__)


class GenerationProcess:
    """Loads the stage and answers requests."""

    def __init__(self, arguments: argparse.Namespace, listener: socket.socket) -> None:
        self._arguments, self._listener = arguments, listener
        self._worker = ThreadPoolExecutor(1, "head")
        self._endpoint = OpenAiEndpoint()
        self._link: TailLink | None = None
        self._loading: asyncio.Task[None] | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve until SIGTERM, then to the end of the texts that are generated.

        The agent holds the listening socket, too: new requests wait there for the next process.
        """
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        loop.add_signal_handler(signal.SIGTERM, stop.set)
        self._loading = loading = asyncio.create_task(self._load(), name="load-head")
        server = await asyncio.start_unix_server(self._accept, sock=self._listener, limit=wire.MAX_LINE_BYTES)
        await stop.wait()
        server.close()
        loading.cancel()
        if self._connections:
            await asyncio.wait(self._connections)  # the agent ends the process when that takes too long
        if self._link is not None:
            await self._link.close()

    async def _load(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            model = await loop.run_in_executor(self._worker, self._loaded)
        except (EdgeflError, OSError, MemoryError) as error:
            reason = str(error) or "there is too little memory to load the model"
            event(_log, logging.ERROR, "generation.refused", reason=reason)
            self._endpoint.refusal = reason
            return
        info, self._endpoint.model = model.info, model
        event(_log, logging.INFO, "generation.up", pid=os.getpid(), model=info.name, blocks=f"{info.start}-{info.end}",
              tail=self._arguments.tail or "-")  # fmt: skip

    def _loaded(self) -> TextModel:
        """Return the model, its generator and its tokenizer; raises ConfigError if it cannot be used here."""
        given = self._arguments
        info = read_stage(given.folder)
        check_first(info, given.tail, "--generate-tail")
        check_memory(info, given.memory_mb)  # before the limit, in which there may be no memory to say so
        limit_own_memory(given.memory_mb)
        codec = TextCodec(given.folder, info)
        part = load_part(given.folder, numpy_engine())
        if given.tail:
            home = Path(given.home) if given.home else None
            self._link = TailLink(
                TailAddress(target=given.tail, model=given.tail_model or info.name, digest=info.tail_digest, home=home,
                            device=given.device)
            )  # fmt: skip
        return TextModel(
            info=info, codec=codec, generator=Generator(part, self._worker, self._link, given.format)
        )  # fmt: skip

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer), name="connection")
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the one request of a connection; its text ends with the connection."""
        try:
            if not wire.is_own(writer.get_extra_info("socket")):
                return
            async with asyncio.timeout(READ_S):
                request = wire.parse_forwarded(await reader.readline())
                body = await reader.readexactly(request.length)
            answering = asyncio.create_task(self._answer(request, body, writer), name="answer")
            gone = asyncio.create_task(reader.read(1), name="client-gone")
            await asyncio.wait((answering, gone), return_when=asyncio.FIRST_COMPLETED)
            gone.cancel()
            answering.cancel()  # no effect if it is done
            with contextlib.suppress(asyncio.CancelledError):
                await answering
        except (OSError, TimeoutError, ProtocolError, asyncio.IncompleteReadError) as error:
            event(_log, logging.DEBUG, "generation.connection_ended", reason=error)
        finally:
            writer.close()

    async def _answer(self, request: wire.ForwardedRequest, body: bytes, writer: asyncio.StreamWriter) -> None:
        async def send(message: wire.ResponseHead | bytes) -> None:
            writer.write(wire.line(message) if isinstance(message, wire.ResponseHead) else wire.piece(message))
            await writer.drain()

        if self._loading is not None and not self._loading.done():
            await asyncio.wait([self._loading], timeout=LOADING_S)
        await self._endpoint.answer(request.method, request.path, body, send)
        await send(b"")


async def _main(arguments: argparse.Namespace, listener: socket.socket, control: socket.socket) -> None:
    loop = asyncio.get_running_loop()

    def gone() -> Any:
        if not control.recv(1):
            os._exit(0)  # the agent is gone, and a computation may take long

    loop.add_reader(control, gone)
    await GenerationProcess(arguments, listener).run()


def main() -> None:
    """Run as the agent's child."""
    parser = argparse.ArgumentParser(prog="edgefl-generation", description="The agent's generation process.")
    for name in ("listen", "control"):
        parser.add_argument(f"--{name}", type=int, required=True, help="a descriptor that the agent passes")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--tail", default="", help="HOST:PORT; empty = the folder has the whole model")
    parser.add_argument("--tail-model", default="", help="the tail's name there; empty = the model's")
    parser.add_argument("--format", default="fp16")
    parser.add_argument("--home", default="", help="home with the device's certificate; empty = no TLS")
    parser.add_argument("--device", default="")
    parser.add_argument("--memory-mb", type=int, default=0, help="memory limit; 0 = none")
    parser.add_argument("--log-level", type=int, default=logging.INFO)
    arguments = parser.parse_args()
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    set_up_logging(arguments.log_level)
    listener, control = socket.socket(fileno=arguments.listen), socket.socket(fileno=arguments.control)
    asyncio.run(_main(arguments, listener, control))


if __name__ == "__main__":
    main()
