"""A job's training process: has torch and the task's code, and trains the cloud's part for all devices of the job.

    python -P -m cloud.split.trainer_main --control N --folder FOLDER --settings FILE

A child of the split training's server; it ends with it. It gets no key and no secret: the server checks who calls, and
passes on bytes. What a device's message breaks ends that device's session alone; only a lack of memory, or a bug, ends
the process, which the server starts again, and devices continue from what was kept.
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
from pathlib import Path
from typing import Any

from cloud.split.cache import CacheQuota, QuotaExceeded
from cloud.split.records import END, FORGET, FRAME, GONE, HEAD, OPEN, READY, TAKEN, SessionSpec, record
from cloud.split.results import SplitFolder
from cloud.split.sessions import CloudJob, CloudSession
from edgefl.bundle import load_bundle, unpack_bundle
from edgefl.config import TrainConfig, from_dict
from edgefl.errors import ConfigError, EdgeflError, ProtocolError, TaskError, out_of_memory
from edgefl.offload.training.model import PartedModel
from edgefl.process.children import die_with_parent, limit_own_memory
from edgefl.protocols.split.messages import parse_frame


class CloudTrainer:
    """Handles the records of the server, one after the other."""

    def __init__(self, control: socket.socket, job: CloudJob) -> None:
        self._control, self._job = control, job
        self._sessions: dict[int, CloudSession] = {}
        self._specs: dict[int, SessionSpec] = {}

    def run(self) -> None:
        """Work until the server closes the socket."""
        self._control.sendall(record(0, READY))
        while (head := self._exactly(HEAD.size)) is not None:
            session, kind, length = HEAD.unpack(head)
            content = self._exactly(length)
            if content is None:
                return
            self._handle(session, kind, content)

    def _handle(self, session: int, kind: int, content: bytes) -> None:
        if kind == FRAME:
            self._answer(session, content)
        elif kind == OPEN:
            self._specs[session] = SessionSpec.decode(content)
        elif kind == GONE:
            self._specs.pop(session, None)
            self._sessions.pop(session, None)
        elif kind == FORGET:
            self._job.forget(int(content))

    def _answer(self, session: int, content: bytes) -> None:
        """Handle a device's frame; a fault ends its session."""
        if session not in self._specs:  # a frame that came after the session's end
            return
        try:
            if session not in self._sessions:
                self._sessions[session] = self._job.session(self._specs[session])
            answer = self._sessions[session].handle(parse_frame(content))
        except (EdgeflError, QuotaExceeded, MemoryError, RuntimeError, OSError) as error:
            status, reason = refusal_of(error)
            self._job.drop(self._specs.pop(session).device)
            self._sessions.pop(session, None)
            self._control.sendall(record(session, END, json.dumps({"status": status, "reason": reason}).encode()))
            return
        self._control.sendall(record(session, FRAME, answer))
        self._control.sendall(record(session, TAKEN))

    def _exactly(self, length: int) -> bytes | None:
        """Return so many bytes; None if the server has closed the socket."""
        data = bytearray(length)
        view = memoryview(data)
        while view:
            num = self._control.recv_into(view)
            if not num:
                return None
            view = view[num:]
        return bytes(data)


def refusal_of(error: BaseException) -> tuple[str, str]:
    """Return the status and the reason for which a session ends."""
    if isinstance(error, QuotaExceeded) or out_of_memory(error):
        return "RESOURCE_EXHAUSTED", str(error) or "the cloud has too little memory for this device's training"
    if isinstance(error, OSError):
        return "UNAVAILABLE", f"an operating system error in the cloud: {error}"
    if isinstance(error, ProtocolError):
        return "INVALID_ARGUMENT", str(error)
    if isinstance(error, TaskError | ConfigError):
        return "FAILED_PRECONDITION", str(error)
    return "INVALID_ARGUMENT", f"what the device sent cannot be computed: {error}"


def main() -> None:
    """Load the task, and work."""
    parser = argparse.ArgumentParser(prog="edgefl-split-trainer", description="A job's training process in the cloud.")
    parser.add_argument("--control", type=int, required=True)
    parser.add_argument("--settings", type=Path, required=True)
    arguments = parser.parse_args()
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server stops its children
    control = socket.socket(fileno=arguments.control)
    control.set_inheritable(False)
    settings: dict[str, Any] = json.loads(arguments.settings.read_text())
    limit_own_memory(settings["memory_mb"])
    try:
        job = load_job(settings)
    except (EdgeflError, OSError) as error:
        control.sendall(record(0, END, json.dumps({"status": "FAILED_PRECONDITION", "reason": str(error)}).encode()))
        return
    CloudTrainer(control, job).run()


def load_job(settings: dict[str, Any]) -> CloudJob:
    """Return the job of a settings file; raises the errors of loading a task."""
    import torch

    torch.set_num_threads(settings["threads"])
    folder = SplitFolder(Path(settings["home"]), settings["job"])
    unpacked = folder.work / "bundle"
    unpack_bundle(Path(settings["bundle"]), unpacked)
    task = load_bundle(unpacked, settings["task"])
    model = PartedModel(task=task, config=from_dict(TrainConfig, settings["train"]))
    return CloudJob(
        model=model, folder=folder, quota=CacheQuota(settings["device_cache_bytes"], settings["cache_bytes"])
    )


if __name__ == "__main__":
    main()
