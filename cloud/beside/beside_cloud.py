"""A server beside a cloud: on the cloud's home, with a port and a certificate of its own.

It reads the cloud's database (who is enrolled) and its CA. It does not lock the home: the cloud does, and both run at
the same time. The servers of stages, of a language model's tail and of split training are such.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cloud.aggregator import keep_freed_memory
from cloud.dataplane.callers import CallerChecks, Callers
from cloud.dataplane.grpc_port import GrpcPort
from cloud.dataplane.known_devices import KnownDevices
from cloud.dataplane.running_calls import RunningCalls
from cloud.servers import PortKind, serve_grpc, unwrapped
from cloud.shares import Shares
from cloud.state.enrolment import Enrolment
from cloud.state.store import open_database
from cloud.trust.own_certificates import renew_server
from edgefl.errors import ConfigError, EdgeflError, HomeError
from edgefl.logs import event
from edgefl.process.descriptors import raise_limit
from edgefl.process.home import check_home
from edgefl.protocols.addresses import is_loopback
from edgefl.protocols.tls import CLOUD_NAME, Identity

REMOVED = "this device was removed from the fleet; enrol it again with a new token"
_RENEW_S = 3600.0

Watch = Callable[[], Coroutine[Any, Any, None]]  # runs as long as the port is open
MakeHandler = Callable[[Callers, RunningCalls, GrpcPort], Any]  # of gRPC's generic handlers

_log = logging.getLogger(__name__)


class BesideCloud:
    """The home, the port and the certificate of a server beside a cloud."""

    def __init__(self, home: Path, host: str, port: int, *, names: Sequence[str] = (), insecure: bool = False) -> None:
        """`names` are more names and addresses at which devices reach it. Raises HomeError, ConfigError."""
        check_home(home, "cloud")
        self._tls = home / "tls"
        if not (self._tls / "ca.key").exists():
            raise HomeError(f"{home} has no CA yet; start its cloud first: `edgefl cloud start`")
        self.home, self._host, self._port, self._insecure = home, host, port, insecure
        self._hosts = sorted({host, "localhost", "127.0.0.1", socket.gethostname(), *names} - {"0.0.0.0", "::"})  # noqa: S104 - not bound
        self._exit = contextlib.ExitStack()
        self._shares = Shares.of(raise_limit(), builtin_broker=False)
        self.engine = open_database(home / "cloud.db")
        self._exit.callback(self.engine.dispose)
        self._enrolment = Enrolment(self.engine, self._tls)

    @property
    def address(self) -> str:
        """HOST:PORT of its port."""
        return f"{self._host}:{self._port}"

    def certified(self, name: str) -> Identity:
        """Return the identity below HOME/stages/NAME, with a new certificate if it has none; raises OSError."""
        folder = self.home / "stages" / name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        identity = Identity(folder / "key.pem", folder / "cert.pem", self._tls / "ca.pem")
        self._renew(identity)
        return identity

    def run(self, serve: Callable[[asyncio.Event], Coroutine[Any, Any, None]]) -> None:
        """Run `serve`, whose event is set by SIGTERM and SIGINT, to its end."""
        keep_freed_memory()

        async def until_stopped() -> None:
            stop, loop = asyncio.Event(), asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, stop.set)
            await serve(stop)

        with self._exit:
            asyncio.run(until_stopped())

    @contextlib.asynccontextmanager
    async def serving(
        self, identity: Identity, make_handler: MakeHandler, kind: PortKind, watches: Sequence[Watch] = ()
    ) -> AsyncIterator[None]:
        """Serve enrolled devices within the block; raises ConfigError for a port in use.

        A watch that fails, which is a bug, ends the server.
        """
        known = KnownDevices(self._enrolment.is_known, asyncio.get_running_loop().time)
        calls = RunningCalls()
        all_watches: list[Watch] = [functools.partial(self._keep_certificate, identity), *watches]

        def handlers(port: GrpcPort, workers: ThreadPoolExecutor) -> list[Any]:
            def end(device: str) -> None:
                calls.cut(device, REMOVED)
                port.drop(device)

            all_watches.append(functools.partial(known.watch, calls.devices, end, workers))
            checks = CallerChecks(
                is_known=known.is_known, was_known=known.was_known, insecure=self._insecure, admit=port.admit,
                pace=port.pace,
            )  # fmt: skip
            return [make_handler(Callers(checks, calls, workers), calls, port)]

        tls = None if self._insecure else identity
        async with serve_grpc(self._host, self._port, tls, self._shares, handlers, kind):
            with unwrapped():
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(watch(), name="beside-cloud") for watch in all_watches]
                    try:
                        yield
                    finally:
                        for task in tasks:
                            task.cancel()

    async def _keep_certificate(self, identity: Identity) -> None:
        """Renew the certificate when a third of its lifetime is left; gRPC reads it at the next handshake."""
        while True:
            await asyncio.sleep(_RENEW_S)
            try:
                await asyncio.to_thread(self._renew, identity)
            except (EdgeflError, OSError, ValueError) as error:
                event(_log, logging.ERROR, "certificates.not_looked_after", reason=error)

    def _renew(self, identity: Identity) -> None:
        renew_server(self._tls, identity, self._hosts, CLOUD_NAME)


def refuse_insecure(host: str, *, insecure: bool) -> None:
    """Raise ConfigError for a port without TLS that others reach."""
    if insecure and not is_loopback(host):
        raise ConfigError(
            f"--insecure is for loopback only, --host is {host}; drop --insecure, or use a loopback address"
        )
