"""The Ray cluster that a simulation runs on: an existing one, by its address, or a small one started here.

Ray's programs listen on every interface, so only clients with the token of our cluster may submit work to it.
Our cluster has its own folder and ends, with all its processes, when this process ends.
Ray sends no usage statistics, shows no dashboard, and prints nothing into our output.
Invariant: an address without a cluster is refused within HEALTH_S.
"""

from __future__ import annotations

import gc
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType

from edgefl.errors import ConfigError, MissingExtra
from edgefl.measure import num_cores

CONNECT_S = 5.0
HEALTH_S = 60.0  # mostly for the import of Ray
MAX_SOCKET_FOLDER = 40  # characters; Ray creates sockets below it, whose paths are limited to 107
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else it warns of a future change at each start
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # else it prints each lost worker to our stdout
}
_WHAT_TO_DO = "Start one with `ray start --head`, or drop the address to start one on this machine."


class Cluster:
    """A connection to a cluster: `HOST:PORT`, `auto` for this machine's cluster, None to start one."""

    def __init__(self, address: str | None = None) -> None:
        self.ray = import_ray()
        self.ours = False
        self._environment: dict[str, str | None] = {}  # original values of changed variables
        self._folder: str | None = None
        self._connected = not self.ray.is_initialized()
        if not self._connected:
            if address is not None:
                raise ConfigError("this process is already connected to a Ray cluster: drop the address")
        elif address is None:
            self._start()
        else:
            _refuse_unreachable(address)
            self._connect({"address": address}, f"cannot join the Ray cluster at {address}")

    def num_cpus(self) -> int:
        """Return the CPUs of all its nodes."""
        return int(self.ray.cluster_resources().get("CPU", 0))

    def close(self) -> None:
        """Disconnect from it; end it if we started it."""
        with undisturbed(), _without_leaks_told():
            if self._connected:
                self.ray.shutdown()
            self._set_environment(self._environment)
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> None:
        self.ours = True
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_AUTH_TOKEN_PATH": None}
        self._environment = {name: os.environ.get(name) for name in token}
        self._set_environment(token)
        self._folder = _socket_folder()
        settings = {"address": "local", "num_cpus": num_cores(), "include_dashboard": False, "_temp_dir": self._folder}
        self._connect(settings, "cannot start a Ray cluster on this machine")

    def _set_environment(self, variables: Mapping[str, str | None]) -> None:
        """Set or remove the variables of the token; Ray read them at its import, so make it read them again."""
        if not variables:
            return
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        raylet = self.ray._raylet  # noqa: SLF001 - there is no other door
        raylet.AuthenticationTokenLoader.instance().reset_cache()
        raylet.Config.initialize("")

    def _connect(self, settings: Mapping[str, object], failure: str) -> None:
        quiet = {"log_to_driver": False, "configure_logging": False, "logging_level": "ERROR"}
        try:
            with _without_leaks_told(), _own_sigterm():
                self.ray.init(**settings, **quiet)
        except BaseException as cause:  # also on Ctrl-C: end everything that was started
            self.close()
            if not isinstance(cause, (OSError, RuntimeError, ValueError, self.ray.exceptions.RayError)):
                raise
            raise ConfigError(f"{failure}: {str(cause).strip().partition(chr(10))[0]}") from cause


def import_ray() -> ModuleType:
    """Import Ray with its output silenced; raises MissingExtra."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.exceptions
    except ImportError as cause:
        raise MissingExtra("the engine 'ray'", "ray") from cause
    return ray


def _refuse_unreachable(address: str) -> None:
    """Check in a separate process, which can be killed, whether a cluster exists: Ray itself would try for minutes."""
    if address != "auto":
        _refuse_unheard(address)
    command = [sys.executable, "-P", "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=HEALTH_S, check=False)
    except subprocess.TimeoutExpired as cause:
        raise ConfigError(f"no Ray cluster answers at {address} within {HEALTH_S:g} s. {_WHAT_TO_DO}") from cause
    if done.returncode:
        said = (done.stderr.strip() or f"its health check ended with {done.returncode}").splitlines()[-1].rstrip(".")
        raise ConfigError(f"there is no Ray cluster to join at {address}: {said}. {_WHAT_TO_DO}")


def _refuse_unheard(address: str) -> None:
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or "/" in host:
        raise ConfigError(f"the Ray address {address!r} is not of the form HOST:PORT, or 'auto' for this machine's")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, OverflowError) as cause:
        raise ConfigError(f"no Ray cluster answers at {address}: {cause}. {_WHAT_TO_DO}") from cause


def _socket_folder() -> str:
    usual = tempfile.gettempdir()
    return tempfile.mkdtemp(prefix="ray-", dir=usual if len(usual) < MAX_SOCKET_FOLDER else "/tmp")  # noqa: S108


@contextmanager
def _without_leaks_told() -> Iterator[None]:
    """Suppress warnings about log files and processes that Ray leaves to the garbage collector."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        yield
        gc.collect()


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Restore the SIGTERM handler, which Ray replaces."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Block Ctrl-C while processes are ended, so that none is left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
