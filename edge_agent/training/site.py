"""Training by several processes: torchrun's launcher as a child of the trainer, and requests to its leading process.

    trainer -- launcher (torch.distributed.run) -- worker 0 (leads), worker 1 ..      on the agent's machine
               launcher                         -- worker 2 ..                        on others, `edgefl agent join`

The launcher restarts all workers if one of them dies; the new leader connects and gets the open request again. So a
killed worker costs the round some seconds. The workers stay for the next requests, as the trainer does.
Invariant: a request ends with the leader's answer, or with why there is none; after that no worker works on it.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from edge_agent.training import trainer_wire as wire
from edgefl.config import AUTO
from edgefl.errors import ProtocolError, TaskError
from edgefl.records import DeviceEvaluation

MAX_TRIES = 4  # for one request, if its workers die
END_S = 5.0  # time limit for the launcher to end
_STDERR = 2
LEADER = "leader"  # the socket in a site's folder


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteSettings:
    """How a machine starts its processes of a training; the launcher's only argument, as JSON."""

    folder: str  # for sockets and files of this machine's processes; it exists
    processes: int | str  # on this machine
    rendezvous: str = ""  # HOST:PORT on the agent's machine; empty = there is one machine
    machines: int = 1
    leads: bool = True  # this is the agent's machine
    options: str = ""  # JSON: data options that replace the agent's on this machine

    def text(self) -> str:
        return json.dumps(asdict(self))

    @property
    def address(self) -> str:
        """The own address of this machine, as the others reach it; raises ConfigError if there is no way to them."""
        from edge_agent.training.site_network import own_address

        return own_address(self.rendezvous, leads=self.leads) if self.rendezvous else "127.0.0.1"


def is_shared(request: wire.FitRequest) -> bool:
    """Whether several processes share a request's training."""
    if request.rendezvous:
        return True
    return num_processes(request.train.processes) > 1


def num_processes(wanted: int | str) -> int:
    """Return how many processes train on this machine; `auto` is one per GPU."""
    if wanted != AUTO:
        return int(wanted)
    import torch

    return max(1, torch.accelerator.device_count())


class Site:
    """The processes of one machine that train together. Used from the trainer's main thread."""

    def __init__(self) -> None:
        self._launcher: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._listener: socket.socket | None = None
        self._leader: socket.socket | None = None
        self._started: tuple[object, ...] = ()

    def run(self, request: wire.FitRequest, tell: Callable[[wire.WorkDone], None]) -> wire.Answer:
        """Return the leader's last answer, and tell an earlier one: the update, before it is evaluated.

        Raises TaskError if the processes cannot start, or die again and again.
        """
        how = ""
        for _ in range(MAX_TRIES):
            try:
                self._start(request)
                self._connect()
                return self._ask(request, tell)
            except (EOFError, OSError, ProtocolError) as error:  # the leader died; the launcher restarts all
                how = str(error)
                self._hang_up()
        self.stop()
        raise TaskError(
            f"the {request.train.processes} processes of this training died {MAX_TRIES} times. {how}".strip()
        )

    def stop(self) -> None:
        """Kill all processes on this machine."""
        self._hang_up()
        if self._launcher is not None:
            self._launcher.kill()  # its workers die with it
            self._launcher.wait(END_S)
            os.close(self._pidfd)
        if self._listener is not None:
            self._listener.close()
        self._launcher = self._listener = None

    def _start(self, request: wire.FitRequest) -> None:
        wanted = (request.train.processes, request.rendezvous, request.machines, request.packages)
        if self._launcher is not None and wanted == self._started and self._launcher.poll() is None:
            return
        self.stop()
        self._started = wanted
        folder = Path(request.bundle).with_name("site")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        self._listener = listen(folder)
        settings = SiteSettings(
            folder=str(folder), processes=num_processes(request.train.processes), rendezvous=request.rendezvous,
            machines=request.machines,
        )  # fmt: skip
        self._launcher = launch(settings, request.packages)
        self._pidfd = os.pidfd_open(self._launcher.pid)

    def _connect(self) -> None:
        """Take the newest connection of a leader; wait for one if there is none."""
        if self._listener is None:
            raise OSError("the site was stopped")
        while self._leader is None or self._is_ready(self._listener):
            self._wait_for(self._listener)
            self._hang_up()
            self._leader, _ = self._listener.accept()

    def _ask(self, request: wire.FitRequest, tell: Callable[[wire.WorkDone], None]) -> wire.Answer:
        if self._leader is None:
            raise EOFError
        self._leader.sendall(wire.frame(request))
        answer = self._answer()
        if not (isinstance(answer, wire.WorkDone) and answer.evaluates):
            return answer
        tell(answer)
        try:
            return self._answer()
        except (EOFError, OSError, ProtocolError) as error:  # the update counts all the same
            self._hang_up()
            fault = f"the process that evaluated died. {error}".strip()
            return replace(answer, evaluates=False, evaluation=DeviceEvaluation(fault=fault))

    def _answer(self) -> wire.Answer:
        answer = wire.parse(self._receive(wire.body_bytes(self._receive(wire.HEAD_BYTES))))
        if not isinstance(answer, wire.WorkDone | wire.WorkFailed):
            raise ProtocolError(f"a worker answered with {type(answer).__name__}")
        return answer

    def _receive(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            if self._leader is None:
                raise EOFError
            self._wait_for(self._leader)
            part = self._leader.recv(size - len(data))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    def _wait_for(self, sock: socket.socket) -> None:
        """Wait until a socket can be read; raises TaskError if the launcher ended before."""
        ready, _, _ = select.select([sock.fileno(), self._pidfd], [], [])
        if sock.fileno() in ready:
            return
        status = self._launcher.wait(END_S) if self._launcher is not None else 0
        self.stop()
        if status == INCOMPLETE:
            raise TaskError(
                f"the site is incomplete: its {self._started[2]} machines did not meet at {self._started[1]} in time. "
                "Start `edgefl agent join --site-rendezvous` on each of the others, with the same --site-machines"
            )
        raise ConnectionResetError(f"Their launcher ended with exit status {status}; see the agent's log")

    def _is_ready(self, sock: socket.socket) -> bool:
        return bool(select.select([sock], [], [], 0)[0])

    def _hang_up(self) -> None:
        if self._leader is not None:
            self._leader.close()
        self._leader = None


INCOMPLETE = 75  # the launcher's exit status where not all machines came: EX_TEMPFAIL of sysexits.h


def launch(settings: SiteSettings, packages: str = "") -> subprocess.Popen[bytes]:
    """Start the launcher on this machine."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}  # no module is imported from the working folder
    if packages:
        environment["PYTHONPATH"] = packages
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "edge_agent.training.site_launcher", settings.text()],
        stdin=subprocess.DEVNULL, stdout=_STDERR, env=environment,
    )  # fmt: skip


def listen(folder: Path) -> socket.socket:
    """Return the socket to which a leader connects; the folder is this user's alone."""
    listener = socket.socket(socket.AF_UNIX)
    descriptor = os.open(folder, os.O_PATH)  # a socket's path has at most 107 bytes
    try:
        listener.bind(f"/proc/self/fd/{descriptor}/{LEADER}")
    finally:
        os.close(descriptor)
    listener.listen()
    return listener


def connect(folder: Path) -> socket.socket:
    """Connect to the trainer that listens in a folder."""
    sock = socket.socket(socket.AF_UNIX)
    descriptor = os.open(folder, os.O_PATH)
    try:
        sock.connect(f"/proc/self/fd/{descriptor}/{LEADER}")
    finally:
        os.close(descriptor)
    return sock
