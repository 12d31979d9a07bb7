"""A served data plane that tests of the service and of removals stand on."""

import asyncio
import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from blake3 import blake3

from cloud.dataplane.fleet_service import FleetService, ServiceDependencies, handler
from cloud.dataplane.open_round import OpenRound, Surroundings
from cloud.dataplane.open_rounds import OpenRounds
from cloud.state.blobs import BlobStore
from cloud.state.jobs import Jobs
from cloud.state.spool import Spool
from cloud.state.store import open_database
from cloud.trust.renewal import Renewals
from edgefl.config import JobConfig
from edgefl.exchange import Terms, Yield
from edgefl.process.home import create_home
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols import fleet_pb2_grpc as rpc
from edgefl.protocols import tls
from edgefl.protocols.manifest import new_fleet_key, sign
from edgefl.protocols.messages import Fit


@pytest.fixture
def home(tmp_path):
    """Return the home of a cloud that has a CA and was never started."""
    folder = tmp_path / "home"
    create_home(folder, "cloud")
    (folder / "tls").mkdir()
    tls.create_ca(folder / "tls")
    return folder


class Plane:
    """A served data plane with one open round of devices a and b."""

    def __init__(self, folder):
        self.folder = folder
        tls.create_ca(folder)
        server = self.identity("server")
        tls.issue_server(folder, server, ["localhost"])
        self.engine = open_database(folder / "cloud.db")
        self.blobs, self.spool = BlobStore(folder / "blobs"), Spool(folder / "spool")
        key = new_fleet_key()
        self.jobs, self.rounds = Jobs(self.engine, self.blobs, lambda bundle: sign(bundle, key)), OpenRounds()
        self.known = {"a", "b", "c"}
        self.paced = []  # who called
        self.unsure = ""  # why a region may not know who is enrolled
        self.is_region = False  # whose parent says which rounds are over
        self.renewals = Renewals(self.engine, folder)
        self.model = self.blobs.put_tree({"w": np.arange(3_000_000, dtype=np.float32)})
        self.job = self.jobs.submit("t:t", self.blobs.put(b"zip"), self.model, (), JobConfig())
        row = self.jobs.load(self.job)
        plan = Fit(
            job=self.job, round=1, model=self.model, model_blake3="00", bundle=row.bundle,
            train=row.config.train, deadline_s=60.0, max_update_bytes=self.model.size + 1000,
        )  # fmt: skip
        self.done = queue.SimpleQueue()
        terms = Terms(deadline_s=600.0, offline_grace_s=5.0)
        self.round = OpenRound(plan, ("a", "b"), terms, Surroundings(act=self.done.put))
        self.jobs.open_round(self.job, 1, ("a", "b"))
        self.rounds.add(self.round)
        self._started, self._channels = threading.Event(), []
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(server)), name="data plane")
        self._thread.start()
        assert self._started.wait(10)

    async def _serve(self, identity):
        workers = ThreadPoolExecutor(4)
        deps = ServiceDependencies(
            rounds=self.rounds, jobs=self.jobs, blobs=self.blobs, spool=self.spool, desired_for=lambda _device: [],
            ended=lambda held: [job for job in held if job != self.job],
            is_known=lambda name, _serial: name in self.known, broker_url="mqtts://:8883", renewals=self.renewals,
            is_renewal_due=lambda cert: self.renewals is not None and self.renewals.is_due(cert),
            unsure=lambda: self.unsure,
            pace=lambda who: self.paced.append(who) or 0.0,
            is_over=lambda _job, _number: not self.is_region,
            ca_pem=(self.folder / "ca.pem").read_bytes(),
        )  # fmt: skip
        server = grpc.aio.server(options=[("grpc.max_receive_message_length", 8 << 20)])
        self.service = FleetService(deps, workers)
        server.add_generic_rpc_handlers((handler(self.service),))
        self.port = server.add_secure_port("localhost:0", tls.grpc_server_credentials(identity))
        await server.start()
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._started.set()
        await self._stop.wait()
        await server.stop(1)
        workers.shutdown()

    def next_answer(self):
        """Return the next answer that the round yields."""
        instruction = self.done.get(timeout=5)
        assert isinstance(instruction, Yield)
        return self.round.take(instruction.device)

    def identity(self, name):
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        (folder / "ca.pem").write_bytes((self.folder / "ca.pem").read_bytes())
        return tls.Identity.in_folder(folder)

    def stub(self, device, ca_folder=None):
        identity = self.identity(f"device-{device}")
        request = tls.new_request(identity, device)
        identity.cert.write_bytes(tls.sign_request(ca_folder or self.folder, request, device))
        options = [("grpc.max_receive_message_length", 8 << 20)]
        credentials = tls.grpc_channel_credentials(identity)
        channel = grpc.secure_channel(f"localhost:{self.port}", credentials, options)
        self._channels.append(channel)
        return rpc.FleetStub(channel)

    def close(self):
        for channel in self._channels:
            channel.close()
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self.engine.dispose()

    def upload(self, stub, data, **changes):
        """Upload `data` under a header with `changes`; `cut` sends only so many bytes of it."""
        cut, key = changes.pop("cut", None), changes.pop("key", pb.UpdateKey(job=self.job, round=1))
        offset = changes.get("offset", 0)
        fields = {
            "offset": 0,
            "size": len(data),
            "blake3": blake3(data).hexdigest(),
            "weight": 2.0,
            "metrics": {"loss": 0.5},
        } | changes
        chunks = [pb.UploadChunk(header=pb.UploadHeader(key=key, **fields))]
        body = data[offset:cut]
        chunks += [pb.UploadChunk(data=body[i : i + 1_000_000]) for i in range(0, len(body), 1_000_000)]
        return stub.Upload(iter(chunks), timeout=30)


@pytest.fixture
def plane(tmp_path):
    plane = Plane(tmp_path)
    yield plane
    plane.close()
