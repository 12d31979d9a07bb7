"""The trainer: a child process that trains plan after plan, so that torch is loaded once and not in the agent.

    python -P -m edge_agent.training.trainer_main --fd N        as the agent starts it
    python -P -m edge_agent.training.trainer_main --listen-fds  as systemd's socket activation starts it (fd 3)

-P: no file of the folder that the agent was started in is taken for a module of ours or of a task.

It has the lowest claim on the machine: nice, and limited in memory by RLIMIT_DATA, so that a task
which eats memory gets a MemoryError here and the serving of predictions goes on. A second thread reads
the socket: when the agent goes, the trainer ends at once, whatever the task does.
SIGINT asks it to give up the fit at hand; what the user prints goes to stderr.
"""

from __future__ import annotations

import argparse
import io
import os
import queue
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from blake3 import blake3

from edge_agent.children import die_with_parent
from edge_agent.training import trainer_wire as wire
from edgefl.bundle import load_bundle, unpack_bundle
from edgefl.errors import EdgeflError, TaskError, out_of_memory
from edgefl.guards import not_finite, wrong_metrics, wrong_spec, wrong_weight
from edgefl.hashing import HashingFile
from edgefl.records import Update
from edgefl.task import FitResult
from edgefl.training.local import train_locally
from edgefl.trees import SpooledTree, Tree, spec_of, write_tree

NICENESS = 10
LISTEN_FD = 3  # sd_listen_fds(3): the first descriptor that systemd passes


class _Cancelled(BaseException):
    """The agent no longer wants this fit. Not an Exception: a task's own handlers let it pass."""


class Trainer:
    """Serves one agent over one socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._fits: queue.SimpleQueue[wire.Fit | wire.Errand] = queue.SimpleQueue()  # the agent sends one at a time
        self._fitting = False

    def run(self) -> None:
        signal.signal(signal.SIGINT, self._on_cancel)
        threading.Thread(target=self._read, name="agent", daemon=True).start()
        self._connection.sendall(wire.frame(wire.Hello(pid=os.getpid())))
        while True:
            answer = self._answer(self._fits.get())
            self._connection.sendall(wire.frame(answer))
            if isinstance(answer, wire.Failed) and answer.spent:
                return

    def _read(self) -> None:
        """Pass on what the agent asks; end the process when the agent is gone."""
        try:
            while True:
                message = wire.parse(
                    _receive(self._connection, wire.body_bytes(_receive(self._connection, wire.HEAD_BYTES)))
                )
                if isinstance(message, wire.Fit | wire.Errand):
                    self._fits.put(message)
        except (OSError, EOFError, EdgeflError):
            os._exit(0)  # nobody waits for an answer, and the task may never return

    def _on_cancel(self, _signal: int, _frame: FrameType | None) -> None:
        if self._fitting:
            self._fitting = False
            raise _Cancelled

    def _answer(self, fit: wire.Fit | wire.Errand) -> wire.Done | wire.Failed:
        try:
            self._fitting = True
            if fit.folder:
                os.chdir(fit.folder)
            done = perform(fit) if isinstance(fit, wire.Fit) else perform_errand(fit)
            self._fitting = False
        except _Cancelled:
            return wire.Failed(reason="the round is over")
        except (EdgeflError, MemoryError, OSError) as error:
            self._fitting = False
            return failure(error, fit.memory_limit_mb)
        return done


def perform(fit: wire.Fit) -> wire.Done:
    """Train, check what came out, write it; raises TaskError and what loading a task raises."""
    limit_memory(fit.memory_limit_mb)
    parameters = SpooledTree(Path(fit.model))
    task = load_bundle(_unpacked(fit.bundle), fit.task)
    frozen: Tree | None = SpooledTree(Path(fit.frozen)) if fit.frozen else {} if fit.parted else None
    result = train_locally(
        task, parameters, fit.train, options=fit.options, round=fit.round, client=fit.client, frozen=frozen
    )
    check(task.name, result, parameters, fit)
    return write(result, Path(fit.out))


def perform_errand(errand: wire.Errand) -> wire.Done:
    """Have the ClientApp answer, write the state and then the reply; raises what keeps it from being asked."""
    from edgefl.flower.fleet.deliver import NodeMessage, deliver

    limit_memory(errand.memory_limit_mb)
    outcome = deliver(
        NodeMessage(
            app=errand.app.partition(":")[0].partition(".")[0],
            folder=_unpacked(errand.bundle),
            order=Path(errand.order),
            envelope=errand.envelope,
            options=errand.options,
            state=Path(errand.state) if errand.state else None,
        )
    )
    if outcome.state is not None:
        _overwrite(Path(errand.state_out), lambda file: file.write(outcome.state or b""))
    reply = _overwrite(Path(errand.out), lambda file: file.write(outcome.reply))
    return wire.Done(size=reply.size, blake3=reply.hexdigest(), weight=0.0, changed=outcome.state is not None)


def _unpacked(bundle: str) -> Path:
    archive = Path(bundle)
    folder = archive.with_suffix("")
    unpack_bundle(archive, folder)
    return folder


def check(task: str, result: FitResult, parameters: Tree, fit: wire.Fit) -> None:
    """Raise TaskError for what the cloud would refuse: it need not travel."""
    update = Update(
        job=fit.job, round=fit.round, device=fit.client, tree=result.tree, weight=result.weight, metrics=result.metrics
    )
    fault = (
        wrong_weight(update.weight)
        or wrong_metrics(update.metrics)
        or wrong_spec(spec_of(update.tree), spec_of(parameters))
        or not_finite(update)
    )
    if fault:
        raise TaskError(f"task {task!r}: training gave what cannot be an update: {fault}")


def write(result: FitResult, path: Path) -> wire.Done:
    """Write the update over whatever is at `path`, and sync it."""
    written = _overwrite(path, lambda file: write_tree(result.tree, file))
    return wire.Done(size=written.size, blake3=written.hexdigest(), weight=result.weight, metrics=result.metrics)


def _overwrite(path: Path, fill: Callable[[HashingFile], object]) -> HashingFile:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "wb", buffering=0) as file:
        hashing = HashingFile(file, blake3())
        fill(hashing)
        file.truncate(hashing.size)
        os.fdatasync(file.fileno())
    return hashing


def failure(error: BaseException, memory_limit_mb: int) -> wire.Failed:
    """Say why a fit failed; out of memory is told apart, whoever noticed it first."""
    if out_of_memory(error):
        limit = f" of {memory_limit_mb} MB" if memory_limit_mb else ""
        return wire.Failed(reason=f"the task ran out of its memory limit{limit}", spent=True)
    text = str(error) if isinstance(error, EdgeflError) else f"the device could not do it: {error}"
    return wire.Failed(reason=text)


def limit_memory(limit_mb: int) -> None:
    """Bound this process's own data (not the mapped model)."""
    limit = limit_mb << 20 if limit_mb else resource.RLIM_INFINITY
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        limit = hard if limit == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def main() -> None:
    """Take the socket, step back behind all other work, and serve until the agent ends it."""
    parser = argparse.ArgumentParser(prog="edgefl-trainer", description="The agent's training process.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--fd", type=int, help="a connected socket that the agent passes")
    source.add_argument("--listen-fds", action="store_true", help="a listening socket that systemd passes")
    arguments = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # what a task prints is in the log when it is printed
    # Threads that spin while they wait take the cores from serving, and from each other, a hundredfold.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded, which is later
    if arguments.listen_fds:
        connection = _accept()
    else:
        die_with_parent()  # even where a task never lets the reading thread run
        connection = socket.socket(fileno=arguments.fd)
    connection.set_inheritable(False)  # a process that the task starts must not keep it open
    here = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, max(NICENESS, here))
    try:
        Trainer(connection).run()
    except BrokenPipeError:
        sys.exit(0)  # the agent went while we answered


def _accept() -> socket.socket:
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS") != "1":
        raise SystemExit("--listen-fds is for systemd's socket activation with one socket")
    with socket.socket(fileno=LISTEN_FD) as listener:
        connection, _ = listener.accept()  # systemd starts us because an agent has connected
    return connection


def _receive(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


if __name__ == "__main__":
    main()
