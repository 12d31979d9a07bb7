"""What the real programs see in a simulation: the same names, bound to the simulation's clock, threads, disk, network.

The programs are run unchanged: in the namespaces of their modules, a module such as `threading`, `time` or `grpc` is
replaced by an object with the same contract, and so are the few things that a simulation has no use for (a listening
socket, HTTPS, the processes that train and serve). Nothing outside of `cloud`, `edge_agent` and `edgefl` is touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import inspect
import queue
import random
import secrets
import sqlite3
import sys
import threading
import time
import types
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import grpc
import sqlalchemy as sa

from edgefl.faults.machine import disk, rpc, rpc_server, threads
from edgefl.faults.machine.mqtt import SimBroker, client_factory
from edgefl.faults.machine.network import Network
from edgefl.faults.machine.threads import kernel
from edgefl.protocols import tls
from edgefl.protocols.messages import Telemetry
from edgefl.records import RoundOutcome
from edgefl.rounds import run_rounds

EPOCH_S = 1_750_000_000.0  # the time of day when a simulation begins
CHUNK_BYTES = 96  # so that small updates are several chunks
PROGRAMS = ("cloud.aggregator", "cloud.region.server.process", "edge_agent.agent")
_WRITERS = (
    "cloud.state.spool",
    "cloud.state.blobs",
    "cloud.state.storage",
    "edgefl.process.durable",
    "edgefl.process.home",
)
_networks: list[Network] = []


def network() -> Network:
    """Return the network of the simulation that runs."""
    return _networks[-1]


class SimTime:
    """The module `time`."""

    def time(self) -> float:
        node = kernel().node
        return EPOCH_S + kernel().now_s + (node.wall_offset_s if node is not None else 0.0)

    def time_ns(self) -> int:
        return int(self.time() * 1e6) * 1000

    def monotonic(self) -> float:
        return kernel().now_s

    def perf_counter(self) -> float:
        return kernel().now_s

    def sleep(self, duration_s: float) -> None:
        kernel().wait(None, duration_s)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


class SimSecrets:
    """The module `secrets`, drawn from the seed."""

    def __init__(self) -> None:
        self.random = random.Random(0)

    def randbits(self, k: int) -> int:
        return self.random.getrandbits(k)

    def token_bytes(self, nbytes: int = 32) -> bytes:
        return self.random.randbytes(nbytes)

    def token_hex(self, nbytes: int = 32) -> str:
        return self.random.randbytes(nbytes).hex()

    def __getattr__(self, name: str) -> Any:
        return getattr(secrets, name)


class _Over:
    """A module with some names replaced."""

    def __init__(self, module: Any, **names: Any) -> None:
        self._module = module
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _create_engine(url: str, connect_args: Mapping[str, Any] = types.MappingProxyType({}), **named: Any) -> sa.Engine:
    return sa.create_engine(url, connect_args={**connect_args, "factory": disk.SimConnection}, **named)


def _credentials(identity: tls.Identity) -> bytes:
    return identity.cert.read_bytes()


@contextlib.asynccontextmanager
async def _serve_grpc(_host: str, port: int, _identity: Any, _shares: Any, make_handlers: Any) -> AsyncIterator[None]:
    limits = types.SimpleNamespace(admit=lambda *_: "", pace=lambda _key: 0.0, drop=lambda _device: None)
    async with rpc_server.serve(network(), port, make_handlers(limits, threads.SimExecutor(8, "data-plane"))):
        yield


@contextlib.asynccontextmanager
async def _serve_http(*_: Any, **_named: Any) -> AsyncIterator[int]:
    yield 0


def _broker(
    _identity: Any, _host: str, port: int, *, is_known: Callable[..., bool], owner: str = tls.CLOUD_NAME, **_named: Any
) -> SimBroker:
    return SimBroker(network(), port, is_known, owner)


class _Inert:
    """A part that a simulation has no use for: every call does nothing, `run` does not end."""

    pid = None

    def __init__(self, *_: Any, **_named: Any) -> None:
        pass

    async def run(self) -> None:
        await asyncio.get_running_loop().create_future()

    def versions(self) -> dict[str, int]:
        return {}

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return lambda *_, **_named: None


def _telemetry(_home: Any) -> Telemetry:
    return Telemetry(
        cpu_count=1, cpu_percent=1.0, ram_available_mb=100.0, ram_total_mb=200.0, disk_free_mb=100.0, load_1m=0.1
    )


class Seen(Protocol):
    """What makes a device's trainer, and hears of each round's outcome before the cloud stores it."""

    def trainer(self, *options: object) -> Any:
        """Return the trainer of the device that starts."""

    def outcome(self, outcome: RoundOutcome) -> None:
        """Take what a round of the cloud has come to."""


def _noted(rounds: Callable[..., Iterator[RoundOutcome]], seen: Seen) -> Callable[..., Iterator[RoundOutcome]]:
    def run_rounds(*arguments: Any) -> Iterator[RoundOutcome]:
        for outcome in rounds(*arguments):
            seen.outcome(outcome)
            yield outcome

    return run_rounds


SECRETS = SimSecrets()
_CLOCK = SimTime()


def _by_identity() -> list[tuple[Any, Any]]:
    """Return what is replaced wherever a module of ours has it."""
    return [
        (threading, threads.SimThreading()),
        (time, _CLOCK),
        (queue, _Over(queue, SimpleQueue=threads.SimQueue)),
        (secrets, SECRETS),
        (sqlite3, disk.SimSqlite()),
        (grpc, rpc.SimGrpc(network)),
        (sa, _Over(sa, create_engine=_create_engine)),
        (ThreadPoolExecutor, threads.SimExecutor),
        (tls.grpc_channel_credentials, _credentials),
    ]


def _by_name(seen: Seen) -> dict[tuple[str, str], Any]:
    """Return what is replaced in one module only."""
    loop_calls = _Over(asyncio, run_coroutine_threadsafe=threads.run_coroutine_threadsafe)
    servers = {"serve_grpc": _serve_grpc, "serve_http": _serve_http, "server_context": lambda *_, **_named: None}
    return {
        **{("cloud.aggregator", name): value for name, value in servers.items()},
        **{("cloud.region.server.process", name): value for name, value in servers.items()},
        ("cloud.region.server.process", "BuiltinBroker"): _broker,
        ("cloud.state.home", "BuiltinBroker"): _broker,
        ("cloud.region.server.loop_calls", "asyncio"): loop_calls,
        ("cloud.region.server.process", "reloading"): lambda *_: lambda: None,
        ("cloud.broker.link", "asyncio"): loop_calls,
        ("edgefl.protocols.mqtt", "new_client"): client_factory(network),
        ("edgefl.protocols.mqtt", "client_context"): lambda *_: None,
        ("cloud.aggregator", "run_rounds"): _noted(run_rounds, seen),
        ("edge_agent.agent", "Trainer"): seen.trainer,
        ("edge_agent.agent", "ServingSupervisor"): _Inert,
        ("edge_agent.agent", "GenerationSupervisor"): _Inert,
        ("edge_agent.agent", "LiveFile"): _Inert,
        ("edge_agent.agent", "keep_alive"): _Inert().run,
        ("edge_agent.agent", "notify"): lambda _state: None,
        ("edge_agent.agent", "bind"): lambda *_: None,
        ("edge_agent.agent", "url_of"): lambda *_, **_named: "http://127.0.0.1:8000",
        ("edge_agent.link.link", "measure"): _telemetry,
        **{(module, "os"): disk.SimOs() for module in _WRITERS},
        **{
            (module, "CHUNK_BYTES"): CHUNK_BYTES
            for module in ("cloud.dataplane.fleet_service", "cloud.region.server.uplink", "edge_agent.link.transfer")
        },
    }


def _modules() -> list[types.ModuleType]:
    for name in PROGRAMS:
        importlib.import_module(name)
    ours = ("cloud.", "edge_agent.", "edgefl.")
    return [
        module
        for name, module in sorted(sys.modules.items())
        if name.startswith(ours) and not name.startswith("edgefl.faults") and module is not None
    ]


def _functions(module: types.ModuleType) -> Iterator[Any]:
    """Yield the functions and methods that a module defines."""
    for value in list(vars(module).values()):
        if getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(value):
            yield value
        elif inspect.isclass(value):
            yield from (one for one in vars(value).values() if inspect.isfunction(one))


@contextlib.contextmanager
def installed(seen: Seen) -> Iterator[None]:
    """Give the programs the simulation's objects within the block."""
    undo: list[Callable[[], None]] = []
    replaced = {id(old): new for old, new in _by_identity()}
    clocks = {id(getattr(time, name)): getattr(_CLOCK, name) for name in ("time", "monotonic", "sleep")}
    try:
        for module in _modules():
            names = vars(module)
            for name, value in list(names.items()):
                if id(value) in replaced:
                    undo.append(_setter(names, name, value))
                    names[name] = replaced[id(value)]
            for function in _functions(module):
                _replace_defaults(function, clocks, undo)
        for (module_name, name), value in _by_name(seen).items():
            names = vars(sys.modules[module_name])
            undo.append(_setter(names, name, names[name]))
            names[name] = value
        yield
    finally:
        for one in reversed(undo):
            one()


def _setter(names: dict[str, Any], name: str, value: Any) -> Callable[[], None]:
    return lambda: names.__setitem__(name, value)


def _replace_defaults(function: Any, clocks: Mapping[int, Any], undo: list[Callable[[], None]]) -> None:
    """Replace clocks that are the defaults of arguments."""
    before, named = function.__defaults__, function.__kwdefaults__
    if before and any(id(one) in clocks for one in before):
        undo.append(lambda: setattr(function, "__defaults__", before))
        function.__defaults__ = tuple(clocks.get(id(one), one) for one in before)
    if named and any(id(one) in clocks for one in named.values()):
        undo.append(lambda: setattr(function, "__kwdefaults__", named))
        function.__kwdefaults__ = {name: clocks.get(id(one), one) for name, one in named.items()}


@contextlib.contextmanager
def entered(over: Network) -> Iterator[None]:
    """Make a network and its kernel those of the simulation that runs."""
    threads.enter(over.kernel)
    _networks.append(over)
    SECRETS.random = random.Random(f"{over.kernel.seed}/secrets")
    try:
        yield
    finally:
        _networks.pop()
        threads.leave()
