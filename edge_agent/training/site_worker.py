"""One of the processes that train together: takes each request from the leader, trains its part.

torchrun starts it. The leader, the first one on the agent's machine, gets requests from the trainer and answers them.
On the other machines of a site, the request's files are copied into a folder of theirs first.
A process that fails in the middle of a training says why to the leader, which answers and ends; then torchrun restarts
all, because the others wait for the one that failed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from edge_agent.training import trainer_wire as wire
from edge_agent.training.site import SiteSettings, connect
from edge_agent.training.trainer_main import (
    evaluated,
    failure,
    frozen_of,
    limit_memory,
    receive,
    see_packages,
    state_of,
    write,
)
from edgefl.bundle import load_bundle, unpack_bundle
from edgefl.errors import EdgeflError, TaskError
from edgefl.process.children import die_with_parent
from edgefl.task import FitResult
from edgefl.training.parallel.together import Assigned, Loaded, train_together
from edgefl.training.parallel.workers import TrainingGroup
from edgefl.training.steps.client_state import begin_from
from edgefl.trees import SpooledTree

RENDEZVOUS_S = 60.0
PART_BYTES = 16 << 20  # of a file on its way to another machine
_PEER_LOST = ("gloo/transport/tcp", "ncclRemoteError", "remote process exited")  # in torch's messages
_FILES = ("bundle", "model", "frozen", "state")  # fields of a request


class Worker:
    """One process of a training."""

    def __init__(self, settings: SiteSettings, workers: TrainingGroup) -> None:
        self._settings, self._workers = settings, workers
        self._local_rank = int(os.environ["LOCAL_RANK"])
        self._folder = Path(settings.folder)
        self._trainer = connect(self._folder) if workers.leads else None

    def run(self) -> NoReturn:
        """Handle requests until the trainer, or the launcher, ends this process."""
        if self._trainer is not None and self._workers.size > 1:
            threading.Thread(target=self._workers.watch, args=(self._give_up,), name="alarms", daemon=True).start()
        while True:
            frame = None if self._trainer is None else self._next()
            request = wire.parse(self._workers.broadcast(frame))
            if not isinstance(request, wire.FitRequest):
                raise TypeError(f"a {type(request).__name__} is not trained together")
            self._handle(request)

    def _next(self) -> bytes:
        if self._trainer is None:
            raise TypeError("only the leader gets requests")
        try:
            return receive(self._trainer, wire.body_bytes(receive(self._trainer, wire.HEAD_BYTES)))
        except (EOFError, OSError):
            os._exit(0)  # the trainer has ended, or takes another leader

    def _handle(self, request: wire.FitRequest) -> None:
        self._workers.refused = False
        try:
            done = self._train(request)
        except (EdgeflError, MemoryError, OSError) as error:
            if not self._workers.refused and is_peer_lost(error):
                os._exit(1)  # torchrun restarts all, and the new leader gets the request again
            failed = dataclasses.replace(failure(error, request.memory_limit_mb), spent=False)
            if self._trainer is not None:
                self._trainer.sendall(wire.frame(failed))
            if self._workers.refused:  # by all of them together
                return
            if self._trainer is None:
                self._workers.raise_alarm(failed.reason)
                threading.Event().wait()  # until the launcher ends it
            os._exit(1)
        self._tell(done)

    def _tell(self, done: wire.WorkDone) -> None:
        if self._trainer is not None:
            self._trainer.sendall(wire.frame(done))

    def _give_up(self, reason: str) -> None:
        if self._trainer is not None:
            self._trainer.sendall(wire.frame(wire.WorkFailed(reason=reason)))
        os._exit(1)

    def _train(self, request: wire.FitRequest) -> wire.WorkDone:
        request = self._with_files(request)
        limit_memory(request.memory_limit_mb // int(os.environ["LOCAL_WORLD_SIZE"]))
        os.chdir(request.folder or self._folder)
        loaded: list[Loaded] = []

        def load() -> Loaded:
            see_packages(request.packages)
            # A folder of its own: others unpack the same bundle at this moment.
            code = self._folder / f"{self._local_rank}" / Path(request.bundle).stem
            unpack_bundle(Path(request.bundle), code)
            task, model = load_bundle(code, request.task), SpooledTree(Path(request.model))
            loaded.append(Loaded(task=task, parameters=model, frozen=frozen_of(request), state=state_of(request)))
            return loaded[0]

        options = {**request.options, **json.loads(self._settings.options or "{}")}
        assigned = Assigned(config=request.train, options=options, round=request.round, client=request.client)
        result = train_together(self._workers, _as_task_error(load), assigned)
        return self._finish(loaded[0], result, request) if self._workers.leads else _nothing()

    def _finish(self, loaded: Loaded, result: FitResult, request: wire.FitRequest) -> wire.WorkDone:
        begun = begin_from(loaded.parameters, loaded.state, request.train)
        done = write(loaded.task.name, result, begun.sent, request)
        if not request.evaluate:
            return done
        return evaluated(done, loaded.task, begun.base, request, loaded.frozen, self._tell)

    def _with_files(self, request: wire.FitRequest) -> wire.FitRequest:
        """Return the request with paths of this machine; files that it lacks are copied from the leader's."""
        if self._settings.machines == 1:
            return request
        paths = {name: Path(getattr(request, name)) for name in _FILES if getattr(request, name)}
        here = {name: self._folder / path.name for name, path in paths.items()}
        lacks = not self._settings.leads
        every = self._workers.gather({name: lacks and not path.exists() for name, path in here.items()})
        for name, path in paths.items():
            if any(one[name] for one in every):
                self._copy(path, here[name])
        self._workers.gather({})  # the files are complete
        if self._settings.leads:
            return request
        for old in self._folder.iterdir():
            if self._local_rank == 0 and old.is_file() and old not in here.values():
                old.unlink(missing_ok=True)
        where = {name: str(path) for name, path in here.items()}
        return dataclasses.replace(
            request,
            folder="",
            bundle=where["bundle"],
            model=where["model"],
            frozen=where.get("frozen", ""),
            state=where.get("state", ""),
        )

    def _copy(self, path: Path, to: Path) -> None:
        """Send a file of the leader to all machines; the first process of each other one writes it."""
        writes = not self._settings.leads and self._local_rank == 0
        part = to.with_name(f"{to.name}.part") if writes else Path(os.devnull)
        with (path if self._workers.leads else Path(os.devnull)).open("rb") as source, part.open("wb") as sink:
            while data := self._workers.broadcast(source.read(PART_BYTES) if self._workers.leads else None):
                sink.write(data)
        if writes:
            part.replace(to)


def _as_task_error(load: Callable[[], Any]) -> Callable[[], Any]:
    """Turn what can go wrong with a task's files into a TaskError, which all processes hear of."""

    def loading() -> Any:
        try:
            return load()
        except TaskError:
            raise
        except (EdgeflError, OSError) as error:
            raise TaskError(str(error)) from error

    return loading


def _nothing() -> wire.WorkDone:
    return wire.WorkDone(size=0, blake3="", weight=0.0)


def is_peer_lost(error: BaseException | None) -> bool:
    """Whether another process's death is what failed: then the request is not at fault."""
    while error is not None:
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _PEER_LOST):
            return True
        error = error.__cause__ or error.__context__
    return False


def main() -> None:
    """Meet the other processes, and work until this one is ended."""
    die_with_parent()
    settings = SiteSettings(**json.loads(sys.argv[1]))
    import torch.distributed

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    stores: Any = torch.distributed  # which does not export them by torch's stubs
    if settings.rendezvous:
        where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = stores.TCPStore(*where, size, is_master=rank == 0, timeout=timedelta(seconds=RENDEZVOUS_S))
    else:
        store = stores.FileStore(f"{settings.folder}/store-{os.environ['TORCHELASTIC_RESTART_COUNT']}", size)
    leads = settings.leads and os.environ["LOCAL_RANK"] == "0"
    Worker(settings, TrainingGroup(store, rank, size, leads=leads, host=settings.address)).run()


if __name__ == "__main__":
    main()
