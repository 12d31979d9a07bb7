"""A served data plane with regions: real certificates, database, spool and gRPC over TLS; rounds that a test opens."""

from __future__ import annotations

import asyncio
import queue
import threading

import grpc
import numpy as np
import pytest
from blake3 import blake3

from cloud.dataplane.fleet_service import FleetService, ServiceDependencies, handler
from cloud.dataplane.open_round import OpenRound, Surroundings
from cloud.dataplane.open_rounds import OpenRounds
from cloud.region.children import Children, ChildrenDependencies
from cloud.region.server.enrolment import RegionProfile
from cloud.region.server.uplink import SumFile, Uplink
from cloud.region.service import TierDependencies, TierService, tier_handler
from cloud.servers import serve_grpc
from cloud.shares import Shares
from cloud.state.blobs import BlobStore
from cloud.state.enrolment import REGION, Enrolment
from cloud.state.jobs import Jobs
from cloud.state.members import Members
from cloud.state.spool import Spool
from cloud.state.storage import Storage
from cloud.state.store import open_database
from edgefl.config import JobConfig
from edgefl.exchange import Close, Terms, Yield
from edgefl.local_fleet import free_ports
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols import tls
from edgefl.protocols.manifest import new_fleet_key, sign
from edgefl.protocols.messages import Fit
from edgefl.protocols.tiers import SumNote
from edgefl.protocols.tiers.mirror import Mirror
from edgefl.protocols.tls import Identity
from edgefl.trees import write_tree
from tests.threaded import LoopThread

WAIT_S = 30.0


class TierPlane:
    """A cloud's data plane with a region r1 of devices a and b, a region r2 of c, r2a below r2 of d, and e."""

    def __init__(self, folder):
        self.folder = folder
        tls.create_ca(folder)
        server = self.identity("server")
        tls.issue_server(folder, server, ["localhost", "127.0.0.1"])
        self.engine = open_database(folder / "cloud.db")
        self.blobs, self.spool = BlobStore(folder / "blobs"), Spool(folder / "spool")
        key = new_fleet_key()
        self.jobs, self.rounds = Jobs(self.engine, self.blobs, lambda bundle: sign(bundle, key)), OpenRounds()
        self.enrolment, self.members = Enrolment(self.engine, folder), Members(self.engine)
        for name, parent in (("r1", "cloud"), ("r2", "cloud"), ("r2a", "r2")):
            self.enroll(name, role=REGION, parent=parent)
        for name, parent in (("a", "r1"), ("b", "r1"), ("c", "r2"), ("d", "r2a"), ("e", "cloud")):
            self.enroll(name, parent=parent)
        self.parameters = {"w": np.arange(500_000, dtype=np.float32), "n": np.array(0, np.int64)}
        self.job = self.jobs.submit(
            "t:t", self.blobs.put(b"zip"), self.blobs.put_tree(self.parameters), (), JobConfig()
        )
        self.heard = queue.SimpleQueue()  # region, device, kind, payload
        self.told = queue.SimpleQueue()  # about regions: key, value
        self.logs = queue.SimpleQueue()  # device, LogSent
        self.desired = {}
        self.paused = set()  # job, round: not open, and not over
        self.children = Children(
            ChildrenDependencies(
                name="cloud", rounds=self.rounds, members=self.members, crl=self.enrolment.crl,
                desired_for=lambda device: self.desired.get(device, []), running=self.jobs.running,
                heard=lambda *said: self.heard.put(said), told=lambda *said: self.told.put(said),
                log=lambda *said: self.logs.put(said), is_over=lambda job, number: (job, number) not in self.paused,
            )
        )  # fmt: skip
        self.members.changed.append(self.children.refresh)
        self.thread = LoopThread("tier plane")
        self.uplinks = []
        self._serving = None
        self.port = free_ports(1)[0]
        self.start()

    def start(self):
        ready = threading.Event()
        self._serving = asyncio.run_coroutine_threadsafe(self._serve(ready), self.thread.loop)
        if not ready.wait(WAIT_S):
            self._serving.result(0)

    def stop(self):
        if self._serving is not None:
            self.thread.loop.call_soon_threadsafe(self._stop.set)
            self._serving.result(WAIT_S)
            self._serving = None

    async def _serve(self, ready):
        self._stop = asyncio.Event()

        def handlers(_port, workers):
            self.service = FleetService(
                ServiceDependencies(
                    rounds=self.rounds, jobs=self.jobs, blobs=self.blobs, spool=self.spool,
                    desired_for=lambda _device: [], ended=lambda _held: [], is_known=self.enrolment.is_known,
                    broker_url="mqtts://:8883",
                ),
                workers,
            )  # fmt: skip
            tier = TierService(
                TierDependencies(
                    children=self.children, callers=self.service.callers, calls=self.service.calls,
                    rounds=self.rounds, jobs=self.jobs, blobs=self.blobs, spool=self.spool, storage=Storage(),
                    is_over=lambda job, number: (job, number) not in self.paused,
                ),
                workers,
            )  # fmt: skip
            return [handler(self.service), tier_handler(tier)]

        shares = Shares.of(4096, builtin_broker=True)
        async with serve_grpc("127.0.0.1", self.port, self.identity("server"), shares, handlers):
            ready.set()
            await self._stop.wait()

    def identity(self, name):
        folder = self.folder / "members" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ca.pem").write_bytes((self.folder / "ca.pem").read_bytes())
        return Identity.in_folder(folder)

    def enroll(self, name, *, role="device", parent="cloud"):
        secret, _ = tls.parse_token(self.enrolment.new_token(role=role))
        identity = self.identity(name)
        request = tls.new_request(identity, name)
        identity.cert.write_bytes(self.enrolment.enroll(secret, name, {}, request, role=role, parent=parent))

    def open(self, number=1, cohort=("a", "b", "c", "d", "e"), deadline_s=600.0, **asked):
        """Open a round; its instructions are in `done`. `asked` are other fields of its assignment."""
        row = self.jobs.load(self.job)
        plan = Fit(
            job=self.job, round=number, model_blake3="00", bundle=row.bundle, deadline_s=deadline_s,
            max_update_bytes=row.model.size + 1000, **{"train": row.config.train, "model": row.model} | asked,
        )  # fmt: skip
        self.done = queue.SimpleQueue()
        opened = OpenRound(plan, cohort, Terms(deadline_s=deadline_s, offline_grace_s=5.0),
                           Surroundings(act=self.done.put))  # fmt: skip
        self.jobs.open_round(self.job, number, cohort)
        self.rounds.add(opened)
        opened.begin()
        return opened

    def yielded(self):
        """Return the devices whose answers the round has yielded since the last call."""
        found = []
        while not self.done.empty():
            if isinstance(instruction := self.done.get(), Yield):
                found.append(instruction.device)
            elif isinstance(instruction, Close):
                found.append("closed")
        return found

    def uplink(self, region, on_change=lambda _key, _value: None, identity=None, port=None):
        """Return the uplink of a region that is running."""
        folder = self.folder / "uplinks" / region
        folder.mkdir(parents=True, exist_ok=True)

        async def make():
            target = f"127.0.0.1:{port or self.port}"
            made = Uplink(
                RegionProfile(name=region, parent_url="", parent_grpc=target, parent_name=tls.CLOUD_NAME),
                identity or self.identity(region), BlobStore(folder / "blobs"), folder / "downloads", Mirror(),
                on_change,
            )  # fmt: skip
            task = asyncio.create_task(made.run(), name=f"uplink {region}")
            return made, task

        made, task = self.thread.run(make())
        self.uplinks.append(task)
        return made

    def drop(self, uplink_task=None):
        """End an uplink, the latest one unless named."""
        task = uplink_task or self.uplinks.pop()

        async def end():
            task.cancel()
            await asyncio.wait([task])

        self.thread.run(end())

    def sum_file(self, note, mean, number=1, round_number=1, name="sum", model=""):
        path = self.folder / f"{name}-{number}"
        with path.open("wb") as file:
            write_tree(mean, file)
        return SumFile(
            job=self.job, round=round_number, number=number, path=path, blake3=blake3(path.read_bytes()).hexdigest(),
            note=note, model=model,
        )  # fmt: skip

    def mean(self, value=1.0):
        return {"w": np.full(500_000, value, np.float32), "n": np.array(value, np.float64)}

    def send(self, uplink, note=None, mean=None, **named):
        """Send a sum and return the state that the parent answers."""
        note = note or SumNote(weights={"a": 1.0, "b": 3.0})
        mean = self.mean() if mean is None else mean
        return self.thread.run(uplink.send(self.sum_file(note, mean, **named)))

    def channel(self, name):
        """Return a blocking channel with a member's certificate."""
        return grpc.secure_channel(f"127.0.0.1:{self.port}", tls.grpc_channel_credentials(self.identity(name)))

    def close(self):
        while self.uplinks:
            self.drop()
        self.stop()
        self.thread.close()
        self.engine.dispose()


STATUS = pb.UploadState.Status


@pytest.fixture
def tiers(tmp_path):
    plane = TierPlane(tmp_path)
    yield plane
    plane.close()
