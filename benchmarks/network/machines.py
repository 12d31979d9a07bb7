"""Machines in one machine: each has a network namespace of its own, and a cable to one switch (see `switch.py`).

A namespace has no name in the file system: it is held by a descriptor of this process, and by the processes inside.
So nothing is left of it once these have ended, however they ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

SWITCH = Path(__file__).with_name("switch.py")
NETWORK = "10.77.0"
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET of unshare(2)
_TUNSETIFF, _TAP, _NO_HEADER = 0x400454CA, 0x0002, 0x1000  # of linux/if_tun.h
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Machine:
    """One machine: its name, its address, and its network namespace as a descriptor of this process."""

    name: str
    address: str
    namespace: int

    def command(self, command: Sequence[str | Path]) -> list[str]:
        """Return what runs a command on this machine; it keeps its process id."""
        here = f"/proc/{os.getpid()}/fd/{self.namespace}"
        return ["nsenter", f"--net={here}", *map(str, command)]

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Let this thread open its sockets on this machine."""
        with _this_namespace() as outside:
            _enter(self.namespace)
            try:
                yield
            finally:
                _enter(outside)

    def processes(self) -> list[psutil.Process]:
        """Return the processes that run on this machine."""
        inode, found = os.fstat(self.namespace).st_ino, []
        for one in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):  # it has ended
                if Path(f"/proc/{one.pid}/ns/net").stat().st_ino == inode and one.status() != psutil.STATUS_ZOMBIE:
                    found.append(one)
        return found


class Machines:
    """Several machines and the switch between them; a context manager that kills what is left on them."""

    def __init__(self, names: Sequence[str], seed: int = 0) -> None:
        self._names, self._seed = names, seed
        self._exit = contextlib.ExitStack()
        self._lock = threading.Lock()
        self.all: dict[str, Machine] = {}

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            undo.push(self._exit)
            taps = {}
            for number, name in enumerate(self._names, 1):
                self.all[name], taps[name] = self._new_machine(name, number)
            ports = [f"{name}={tap}" for name, tap in taps.items()]
            self._switch = subprocess.Popen(
                [sys.executable, "-I", "-S", SWITCH, str(self._seed), *ports],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=tuple(taps.values()),
            )  # fmt: skip
            self._exit.callback(self._end_switch)
            undo.pop_all()
        return self

    def __exit__(self, *_details: object) -> None:
        for machine in self.all.values():
            for process in machine.processes():
                process.kill()
        self._exit.close()

    def __getitem__(self, name: str) -> Machine:
        return self.all[name]

    def set_link(self, name: str, **wishes: float | bool) -> None:
        """Change the link of a machine: `delay_s`, `mbps`, `loss` (of a frame) and `cut`; with `for_s`, for so long.

        It holds when this returns.
        """
        with self._lock:
            self._switch.stdin.write(json.dumps({"port": name, **wishes}).encode() + b"\n")
            self._switch.stdin.flush()
            if self._switch.stdout.read(1) != b".":
                raise RuntimeError("the switch has ended")

    def processes(self) -> dict[str, list[psutil.Process]]:
        """Return the processes on each machine that has any."""
        found = {name: machine.processes() for name, machine in self.all.items()}
        return {name: running for name, running in found.items() if running}

    def _new_machine(self, name: str, number: int) -> tuple[Machine, int]:
        address = f"{NETWORK}.{number}"
        with _this_namespace() as outside:
            _unshare()
            try:
                namespace = self._exit.enter_context(_this_namespace())
                tap = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
                self._exit.callback(os.close, tap)
                fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH", b"eth0", _TAP | _NO_HEADER))
                _ip("link", "set", "lo", "up")
                _ip("address", "add", f"{address}/24", "dev", "eth0")
                _ip("link", "set", "eth0", "up")
            finally:
                _enter(outside)
        return Machine(name, address, namespace), tap

    def _end_switch(self) -> None:
        self._switch.stdin.close()
        self._switch.wait(10)
        self._switch.stdout.close()


def why_not() -> str:
    """Return why there can be no machines here; empty if there can."""
    if missing := [one for one in ("ip", "nsenter") if shutil.which(one) is None]:
        return f"network namespaces need {', '.join(missing)}; deploy/system-packages.sh installs iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with Machines(["a"]):
            return ""
    except (OSError, subprocess.CalledProcessError) as error:
        return f"network namespaces with TAP devices are not permitted here: {error}"


@contextlib.contextmanager
def _this_namespace() -> Iterator[int]:
    descriptor = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _enter(namespace: int) -> None:
    if _libc.setns(namespace, _NEW_NETWORK):
        raise OSError(ctypes.get_errno(), "setns")


def _unshare() -> None:
    if _libc.unshare(_NEW_NETWORK):
        raise OSError(ctypes.get_errno(), "unshare")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
