"""The trainer process: trains for one plan after another, so that torch is loaded once, and not in the agent.

    python -P -m edge_agent.training.trainer_main --fd N        as the agent starts it
    python -P -m edge_agent.training.trainer_main --listen-fds  as systemd's socket activation starts it (fd 3)

-P: modules are not imported from the folder that the agent was started in.

It has the lowest priority on the machine: it runs with a nice value, and RLIMIT_DATA limits its memory, so that a
task that needs too much gets a MemoryError here and serving continues. A second thread reads the socket: when the
agent ends, the trainer ends at once, whatever the task does.
SIGINT cancels the current request; what the task prints goes to stderr.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import os
import queue
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable
from importlib import invalidate_caches
from pathlib import Path
from types import FrameType

from blake3 import blake3

from edge_agent.training import trainer_wire as wire
from edge_agent.training.site import Site, is_shared
from edgefl.bundle import load_bundle, unpack_bundle
from edgefl.errors import EdgeflError, TaskError, out_of_memory
from edgefl.guards import not_finite, wrong_metrics, wrong_spec, wrong_weight
from edgefl.hashing import HashingFile
from edgefl.process.children import die_with_parent
from edgefl.protocols.fields import MAX_PROSE_CHARS
from edgefl.records import DeviceEvaluation, Update
from edgefl.settings.split import SPLIT
from edgefl.task import FitResult, Task
from edgefl.terminal.text import one_line
from edgefl.training.local import as_sent, train_locally
from edgefl.training.local_evaluation import evaluate_locally
from edgefl.training.steps.client_state import begin_from
from edgefl.trees import SpooledTree, Tree, spec_of, write_tree

NICENESS = 10
LISTEN_FD = 3  # sd_listen_fds(3): the first descriptor that systemd passes


class _Cancelled(BaseException):
    """The agent cancelled the request. Not an Exception, so that a task's `except Exception` does not catch it."""


class TrainerProcess:
    """Handles the requests of one agent over one socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._requests: queue.SimpleQueue[wire.Request] = queue.SimpleQueue()  # one at a time
        self._fitting = False
        self._cancelled = False  # while a message was being sent
        self._site = Site()

    def run(self) -> None:
        signal.signal(signal.SIGINT, self._on_cancel)
        threading.Thread(target=self._read, name="agent", daemon=True).start()
        self._connection.sendall(wire.frame(wire.Hello(pid=os.getpid())))
        while True:
            answer = self._answer(self._requests.get())
            self._connection.sendall(wire.frame(answer))
            if isinstance(answer, wire.WorkFailed) and answer.spent:
                return

    def _read(self) -> None:
        """Queue the agent's requests; end the process when the agent has ended."""
        try:
            while True:
                message = wire.parse(
                    receive(self._connection, wire.body_bytes(receive(self._connection, wire.HEAD_BYTES)))
                )
                if isinstance(message, wire.Request):
                    self._requests.put(message)
        except (OSError, EOFError, EdgeflError):
            os._exit(0)  # the agent is gone, and the task may never return

    def _on_cancel(self, _signal: int, _frame: FrameType | None) -> None:
        if self._fitting:
            self._fitting = False
            raise _Cancelled
        self._cancelled = True

    def _answer(self, request: wire.Request) -> wire.Answer:
        try:
            self._cancelled, self._fitting = False, True
            if request.folder:
                os.chdir(request.folder)
            if isinstance(request, wire.FitRequest) and is_shared(request):
                done: wire.Answer = self._site.run(request, self._tell)
            else:
                done = work(request, self._tell)
            self._fitting = False
        except _Cancelled:
            self._site.stop()
            return wire.WorkFailed(reason="the round is over")
        except (EdgeflError, MemoryError, OSError) as error:
            self._fitting = False
            return failure(error, request.memory_limit_mb)
        return done

    def _tell(self, done: wire.WorkDone) -> None:
        """Send an answer that is not the last one. A cancellation waits, so that no message is cut in two."""
        self._fitting = False
        self._connection.sendall(wire.frame(done))
        self._fitting = True
        if self._cancelled:
            self._fitting = False
            raise _Cancelled


def _ignore(_done: wire.WorkDone) -> None:
    """Do nothing."""


def work(request: wire.Request, tell: Callable[[wire.WorkDone], None] = _ignore) -> wire.WorkDone:
    """Do what is requested; raises TaskError, and the errors of loading a task.

    `tell` is called with an update that is complete, before its evaluation, which may cost the process.
    """
    match request:
        case wire.FitRequest():
            return train(request, tell)
        case wire.EvaluateRequest():
            return evaluate(request)
        case wire.DeliverRequest():
            return deliver_message(request)


def train(fit: wire.FitRequest, tell: Callable[[wire.WorkDone], None] = _ignore) -> wire.WorkDone:
    """Train, check the update and write it, then evaluate if that is asked for; a failed evaluation is no error."""
    limit_memory(fit.memory_limit_mb)
    parameters, task = SpooledTree(Path(fit.model)), _loaded(fit)
    frozen = frozen_of(fit)
    if fit.train.mode == SPLIT:
        from edge_agent.training.split.fit import train_in_parts

        result = train_in_parts(task, parameters, fit, frozen, state_of(fit))
    else:
        result = train_locally(
            task, parameters, fit.train, options=fit.options, round=fit.round, client=fit.client, frozen=frozen,
            state=state_of(fit),
        )  # fmt: skip
    begun = begin_from(parameters, state_of(fit), fit.train)
    done = write(task.name, result, begun.sent, fit)
    del result  # its memory is needed
    return evaluated(done, task, begun.base, fit, frozen, tell) if fit.evaluate else done


def evaluated(
    done: wire.WorkDone, task: Task, parameters: Tree, fit: wire.FitRequest, frozen: Tree | None,
    tell: Callable[[wire.WorkDone], None],
) -> wire.WorkDone:  # fmt: skip
    """Tell that the update is complete, then add the evaluation of the parameters that it began with."""
    tell(dataclasses.replace(done, evaluates=True))
    evaluation = evaluate_locally(
        task, parameters, options=fit.options, client=fit.client, seed=fit.train.seed, workers=fit.train.workers,
        frozen=frozen,
    )  # fmt: skip
    return dataclasses.replace(done, evaluation=_tellable(evaluation))


def evaluate(request: wire.EvaluateRequest) -> wire.WorkDone:
    """Evaluate the parameters, and write an update without tensors."""
    limit_memory(request.memory_limit_mb)
    task = _loaded(request)
    evaluation = evaluate_locally(
        task, SpooledTree(Path(request.model)), options=request.options, client=request.client, seed=request.seed,
        workers=request.workers, frozen=frozen_of(request),
    )  # fmt: skip
    done = _write_update(FitResult(tree={}, weight=0.0), Path(request.out))
    return dataclasses.replace(done, evaluation=_tellable(evaluation))


def _loaded(request: wire.TaskRequest) -> Task:
    """Import the request's task, with its packages before the agent's own."""
    see_packages(request.packages)
    return load_bundle(_unpacked(request.bundle), request.task)


def see_packages(folder: str) -> None:
    """Import from a folder of packages before the agent's own, if one is given."""
    if folder and folder not in sys.path:  # the agent starts another process for others
        sys.path.insert(0, folder)
        os.environ["PYTHONPATH"] = folder  # for processes that the task starts
        invalidate_caches()


def frozen_of(request: wire.TaskRequest) -> Tree | None:
    """Return the frozen tensors of a request; None if they are not known."""
    return SpooledTree(Path(request.frozen)) if request.frozen else {} if request.parted else None


def state_of(fit: wire.FitRequest) -> Tree | None:
    """Return what the client kept after its former training; None if there is nothing."""
    return SpooledTree(Path(fit.state)) if fit.state else None


def _tellable(evaluation: DeviceEvaluation) -> DeviceEvaluation:
    """Return an evaluation whose fault is one line of limited length: it may quote the user's error."""
    return dataclasses.replace(evaluation, fault=one_line(evaluation.fault, MAX_PROSE_CHARS))


def deliver_message(request: wire.DeliverRequest) -> wire.WorkDone:
    """Run the ClientApp on a message, write its state, then its reply; raises EdgeflError if the app cannot run."""
    from edgefl.flower.fleet.deliver import NodeMessage, deliver

    limit_memory(request.memory_limit_mb)
    outcome = deliver(
        NodeMessage(
            app=request.app.partition(":")[0].partition(".")[0],
            folder=_unpacked(request.bundle),
            order=Path(request.order),
            envelope=request.envelope,
            options=request.options,
            state=Path(request.state) if request.state else None,
        )
    )
    if outcome.state is not None:
        _overwrite(Path(request.state_out), lambda file: file.write(outcome.state or b""))
    reply = _overwrite(Path(request.out), lambda file: file.write(outcome.reply))
    return wire.WorkDone(size=reply.size, blake3=reply.hexdigest(), weight=0.0, changed=outcome.state is not None)


def _unpacked(bundle: str) -> Path:
    archive = Path(bundle)
    folder = archive.with_suffix("")
    unpack_bundle(archive, folder)
    return folder


def check(task: str, result: FitResult, parameters: Tree, fit: wire.FitRequest) -> None:
    """Raise TaskError for an update that the cloud would refuse, so that it is not sent at all."""
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
        raise TaskError(f"task {task!r}: the result of training is not a valid update: {fault}")


def write(task: str, result: FitResult, parameters: Tree, fit: wire.FitRequest) -> wire.WorkDone:
    """Write the client's next state, if it has one, then the update, over an existing file; sync both.

    The update is in the form that the plan asks for. Raises TaskError if the cloud would refuse it.
    """
    result = dataclasses.replace(result, tree=as_sent(result.tree, fit.train, fit.round, fit.client))
    check(task, result, parameters, fit)
    if result.state:
        _overwrite(Path(fit.state_out), lambda file: write_tree(result.state, file))
    return dataclasses.replace(_write_update(result, Path(fit.out)), changed=bool(result.state))


def _write_update(result: FitResult, path: Path) -> wire.WorkDone:
    written = _overwrite(path, lambda file: write_tree(result.tree, file))
    return wire.WorkDone(size=written.size, blake3=written.hexdigest(), weight=result.weight, metrics=result.metrics)


def _overwrite(path: Path, fill: Callable[[HashingFile], object]) -> HashingFile:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "wb", buffering=0) as file:
        hashing = HashingFile(file, blake3())
        fill(hashing)
        file.truncate(hashing.size)
        os.fdatasync(file.fileno())
    return hashing


def failure(error: BaseException, memory_limit_mb: int) -> wire.WorkFailed:
    """Return why a request failed. Out of memory has its own reason, and the process cannot be used after it."""
    if out_of_memory(error):
        limit = f" of {memory_limit_mb} MB" if memory_limit_mb else ""
        return wire.WorkFailed(reason=f"the task exceeded its memory limit{limit}", spent=True)
    text = str(error) if isinstance(error, EdgeflError) else f"an operating system error on the device: {error}"
    return wire.WorkFailed(reason=text)


def limit_memory(limit_mb: int) -> None:
    """Limit this process's data size; the memory-mapped model does not count."""
    limit = limit_mb << 20 if limit_mb else resource.RLIM_INFINITY
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        limit = hard if limit == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def main() -> None:
    """Open the socket, lower the priority, and handle requests until the agent stops the process."""
    parser = argparse.ArgumentParser(prog="edgefl-trainer", description="The agent's training process.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--fd", type=int, help="a connected socket that the agent passes")
    source.add_argument("--listen-fds", action="store_true", help="a listening socket that systemd passes")
    arguments = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # so that a task's output appears in the log at once
    # Threads that wait actively take the cores from serving, and make each other a hundred times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch reads it when it is imported, later
    if arguments.listen_fds:
        connection = _accept()
    else:
        die_with_parent()  # even if the task never lets the reading thread run
        connection = socket.socket(fileno=arguments.fd)
    connection.set_inheritable(False)  # a process that the task starts must not keep it open
    here = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, max(NICENESS, here))
    try:
        TrainerProcess(connection).run()
    except BrokenPipeError:
        sys.exit(0)  # the agent ended while we answered


def _accept() -> socket.socket:
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS") != "1":
        raise SystemExit("--listen-fds needs systemd's socket activation with exactly one socket; use --fd otherwise")
    with socket.socket(fileno=LISTEN_FD) as listener:
        connection, _ = listener.accept()  # systemd started us because an agent has connected
    return connection


def receive(connection: socket.socket, size: int) -> bytes:
    """Return so many bytes of a socket; raises EOFError at its end."""
    data = bytearray()
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


if __name__ == "__main__":
    main()
