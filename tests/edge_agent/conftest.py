"""A real cloud for the agent's tests: the fleet service over mutual TLS, with what a test wants to see and to break."""

from __future__ import annotations

import asyncio
import hashlib
import io
import signal
import subprocess
import sys
import textwrap
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from blake3 import blake3

from edge_agent.link.channel import CloudChannel
from edge_agent.link.outbox import Outbox
from edge_agent.link.profile import Profile, load_profile, save_profile
from edge_agent.store import Store
from edge_agent.training.bundles import Bundles
from edge_agent.training.environments import Environments
from edge_agent.training.participant import Participant, ParticipantDependencies
from edge_agent.training.trainer import Trainer
from edgefl.config import TrainConfig
from edgefl.process.home import create_home
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols import fleet_pb2_grpc, manifest, messages, tls
from edgefl.protocols.assignments import pack
from edgefl.protocols.inference.texts import TextStage
from edgefl.protocols.messages import BlobRef, Fit, Signed
from edgefl.trees import encoded_bytes, read_tree, write_tree
from tests import onnx_models

WAIT_S = 30.0

FIT = """
    import numpy as np
    from edgefl import FitResult, Task

    def initial():
        return {"w": np.zeros(4, np.float32)}

    def fit(parameters, config, options):
        tree = {name: np.full_like(value, float(options.get("step", 1))) for name, value in parameters.items()}
        return FitResult(tree=tree, weight=3.0, metrics={"train_loss": 0.5})

    task = Task(name="ones", initial=initial, fit=fit)
"""


class FleetServer(fleet_pb2_grpc.FleetServicer):
    """A cloud in small: blobs, open plans, and what came back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key = manifest.new_fleet_key()
        self.blobs: dict[str, bytes] = {}
        self.plans: list[Fit] = []
        self.desired: list[Signed] = []
        self.over: set[str] = set()  # jobs that have ended
        self.updates: dict[tuple[str, int], tuple[pb.UploadHeader, bytes]] = {}
        self.failures: dict[tuple[str, int], str] = {}
        self.parts: dict[tuple[str, int], bytearray] = {}
        self.calls: list[str] = []
        self.broker = ""
        self.chunk_bytes = 1 << 20
        self.before_chunk: Callable[[str, int], None] = lambda _way, _offset: None  # may raise or wait
        self.answer: pb.UploadState | None = None  # to every upload, at its header
        self.not_asked = ""  # why uploads are not taken yet, as a region says that was not asked for them
        self.is_due = False  # whether devices are told to renew their certificates
        self.renew: Callable[[bytes], pb.RenewReply] | None = None  # None = as a cloud does
        self.refusal: tuple[grpc.StatusCode, str] | None = None  # of every renewal
        self.turned_away = ""  # why `Next` is refused
        self.serials: list[str] = []  # of the certificates that asked `Next`
        self._changed = threading.Condition()
        self._server: grpc.Server | None = None
        self.port = 0
        tls.create_ca(folder)
        self.identity = tls.Identity.in_folder(folder)
        tls.issue_server(folder, self.identity, ["127.0.0.1", "localhost"])

    def start(self) -> None:
        workers = ThreadPoolExecutor(8)
        self._server = grpc.server(workers, options=[("grpc.max_receive_message_length", 16 << 20)])
        fleet_pb2_grpc.add_FleetServicer_to_server(self, self._server)
        self.port = self._server.add_secure_port(f"127.0.0.1:{self.port}", tls.grpc_server_credentials(self.identity))
        self._server.start()

    def stop(self) -> None:
        if self._server:
            self._server.stop(None).wait(5)
            self._server = None

    def wait(self, condition: Callable[[], object], what: str = "it") -> None:
        with self._changed:
            assert self._changed.wait_for(condition, WAIT_S), f"{what} did not happen; calls: {self.calls[-20:]}"

    def note(self, call: str) -> None:
        with self._changed:
            self.calls.append(call)
            self._changed.notify_all()

    # What a test puts in.

    def enrol(self, home: Path, device: str = "cam-1", broker_port: int = 1) -> Path:
        create_home(home, "agent")
        identity = tls.Identity.in_folder(home)
        request = tls.new_request(identity, device)
        identity.cert.write_bytes(tls.sign_request(self.folder, request, device))
        identity.ca.write_bytes(self.identity.ca.read_bytes())
        (home / "fleet.pub").write_bytes(manifest.public_pem(self.key))
        save_profile(
            home,
            Profile(
                device=device,
                cloud_url="https://127.0.0.1:9480",
                grpc=f"127.0.0.1:{self.port}",
                broker=f"mqtts://127.0.0.1:{broker_port}",
                tags={"site": "test"},
            ),
        )
        return home

    def blob(self, data: bytes) -> BlobRef:
        digest = hashlib.sha256(data).hexdigest()
        self.blobs[digest] = data
        return BlobRef(sha256=digest, size=len(data))

    def bundle(self, code: str = FIT, dependencies: Sequence[str] = ()) -> Signed:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(zipfile.ZipInfo("user_task.py"), textwrap.dedent(code))
            if dependencies:
                archive.writestr(zipfile.ZipInfo("pyproject.toml"), f"[project]\ndependencies = {list(dependencies)}\n")
        return manifest.sign(manifest.Bundle(blob=self.blob(file.getvalue()), task="user_task:task"), self.key)

    def plan(self, number: int = 1, *, job: str = "j1", code: str = FIT, size: int = 4, deadline_s: float = 60.0,
             bundle: Signed | None = None, offer: bool = True) -> Fit:  # fmt: skip
        tree = {"w": np.full(size, number, np.float32)}
        file = io.BytesIO()
        write_tree(tree, file)
        plan = Fit(
            job=job,
            round=number,
            model=self.blob(file.getvalue()),
            model_blake3=blake3(file.getvalue()).hexdigest(),
            bundle=bundle or self.bundle(code),
            train=TrainConfig(),
            deadline_s=deadline_s,
            max_update_bytes=encoded_bytes(tree) + 1024,
        )
        if offer:
            self.plans.append(plan)
        return plan

    def release(self, onnx: bytes, version: int, *, sequence: int, rollback: bool = False, device: str = "cam-1",
                model: str = "digits", sample: bytes | None = None, base: bytes | None = None,
                patch: bytes | None = None, text: TextStage | None = None) -> Signed:  # fmt: skip
        known, on, change = (None if one is None else self.blob(one) for one in (sample, base, patch))
        release = manifest.Release(
            model=model, version=version, blob=self.blob(onnx), sample=known, base=on, patch=change, text=text
        )
        desired = manifest.Desired(device=device, release=release, sequence=sequence, rollback=rollback)
        return manifest.sign(desired, self.key)

    def tree(self, job: str, number: int) -> dict[str, np.ndarray]:
        return read_tree(self.updates[job, number][1])

    # What the agent calls.

    def Next(self, request, context):  # noqa: N802 - gRPC's name
        self.serials.append(tls.serial_number(context.auth_context()["x509_pem_cert"][0]))
        self.note(f"next {_device(context)}")
        if self.turned_away:
            context.abort(grpc.StatusCode.PERMISSION_DENIED, self.turned_away)
        waiting = [plan for plan in self.plans if not {(plan.job, plan.round)} & (self.updates.keys() | self.failures)]
        return pb.NextReply(
            assignments=[pack(one) for one in waiting],
            desired=[messages.encode(signed) for signed in self.desired],
            broker=self.broker,
            ended=[job for job in request.holding if job in self.over],
            renew=self.is_due,
        )

    def Renew(self, request, context):  # noqa: N802 - gRPC's name
        self.is_due = False
        self.note(f"renew {_device(context)}")
        if self.refusal is not None:
            context.abort(*self.refusal)
        if self.renew is not None:
            return self.renew(request.csr)
        return pb.RenewReply(certificate=tls.sign_request(self.folder, request.csr, _device(context)))

    def Download(self, request, context):  # noqa: N802 - gRPC's name
        self.note(f"download {request.sha256[:8]} {request.offset}")
        data = self.blobs.get(request.sha256)
        if data is None:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such blob")
        for offset in range(request.offset, len(data), self.chunk_bytes):
            self.before_chunk("down", offset)
            yield pb.Chunk(data=data[offset : offset + self.chunk_bytes])

    def Resume(self, request, context):  # noqa: N802 - gRPC's name
        self.note(f"resume {request.job} {request.round}")
        key = (request.job, request.round)
        if self.answer is not None:
            return self.answer
        if key in self.updates:
            return pb.UploadState(status=pb.UploadState.STORED)
        return pb.UploadState(offset=len(self.parts.get(key, b"")))

    def Upload(self, requests, context):  # noqa: N802 - gRPC's name
        header = next(requests).header
        key = (header.key.job, header.key.round)
        self.note(f"upload {key[0]} {key[1]} {header.offset}")
        if self.not_asked:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, self.not_asked)
        if self.answer is not None:
            return self.answer
        part = self.parts.setdefault(key, bytearray())
        del part[header.offset :]
        for message in requests:
            self.before_chunk("up", len(part))
            part += message.data
            self.note(f"chunk {len(part)}")
        if len(part) < header.size:
            return pb.UploadState(offset=len(part))
        assert blake3(part).hexdigest() == header.blake3
        self.updates[key] = (header, bytes(part))
        self.note("stored")
        return pb.UploadState(status=pb.UploadState.STORED, offset=len(part))

    def Fail(self, request, context):  # noqa: N802 - gRPC's name
        self.failures[request.key.job, request.key.round] = request.reason
        self.note(f"fail {request.key.job} {request.key.round}")
        return pb.FailureReply()


def _device(context: grpc.ServicerContext) -> str:
    return context.auth_context()["x509_common_name"][0].decode()


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[FleetServer]:
    folder = tmp_path / "cloud"
    folder.mkdir()
    server = FleetServer(folder)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def home(fleet: FleetServer, tmp_path: Path) -> Path:
    """An enrolled home whose broker does not answer: everything must work by `Next` alone."""
    return fleet.enrol(tmp_path / "agent")


@pytest.fixture
def start_agent(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start the real agent; its log is `<home>.log`."""
    started: list[subprocess.Popen[bytes]] = []

    def start(home: Path, *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "edgefl", "agent", "start", "--home", str(home), "--serve-port", "0", *options]
        with home.with_suffix(".log").open("ab") as log:
            started.append(subprocess.Popen(command, stderr=log, stdout=log, cwd=tmp_path))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    for process in started:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


@pytest.fixture(scope="session")
def onnx_model() -> Callable[..., bytes]:
    """Make a small model: y = x * scale + 1 over x of FP32[-1, features]."""
    return onnx_models.affine


class Device:
    """A participant and all it needs, but no link: tests play the link."""

    def __init__(self, fleet, home, until, *, may_install=False, **options) -> None:
        self.until = until
        self.fleet, self.log = fleet, home / "fits"
        self.store = Store(home)
        self.channel = CloudChannel(load_profile(home), home)
        self.outbox = Outbox(self.store, self.channel)
        self.trainer = Trainer()
        self.environments = Environments(home, may_install=may_install)
        self.participant = Participant(
            ParticipantDependencies(
                device="cam-1", home=home, options={"log": str(self.log), **options}, memory_limit_mb=2000,
                store=self.store, outbox=self.outbox, trainer=self.trainer,
                bundles=Bundles(home, manifest.load_public_key((home / "fleet.pub").read_bytes()), self.channel),
                environments=self.environments, channel=self.channel,
            )
        )  # fmt: skip

    def fits(self) -> str:
        return self.log.read_text().strip() if self.log.exists() else ""

    async def __aenter__(self):
        parts = (self.outbox, self.participant, self.trainer, self.environments)
        self._tasks = [asyncio.create_task(part.run()) for part in parts]
        return self

    async def __aexit__(self, *_):
        for task in self._tasks:
            task.cancel()
        ended = await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.channel.close()
        self.store.close()
        assert all(isinstance(error, asyncio.CancelledError) for error in ended), ended


@pytest.fixture
def on_device(fleet, home, until):
    """Run a coroutine function with a device."""

    def run(function, **options):
        async def inside():
            async with Device(fleet, home, until, **options) as device:
                return await function(device)

        return asyncio.run(inside())

    return run
