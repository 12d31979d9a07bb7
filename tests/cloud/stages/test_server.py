"""The stage server as a process beside a cloud: mutual TLS, a release of the registry, and whatever is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

import grpc
import numpy as np
import pytest

from cloud.stages.server import StageOptions, StageServer, divided_cores
from cloud.state.blobs import BlobStore
from cloud.state.enrolment import Enrolment
from cloud.state.registry import Registry
from cloud.state.store import open_database
from cloud.trust.own_certificates import hosts_of
from edgefl.errors import ConfigError, HomeError, NotFound
from edgefl.models.session import new_session
from edgefl.process.home import create_home
from edgefl.protocols import tls
from edgefl.protocols.inference.service import InferenceStub
from edgefl.protocols.inference.tensors import make_request, response_tensors
from edgefl.protocols.manifest import load_private_key, new_fleet_key, save_private_key
from edgefl.protocols.tls import Identity
from tests import onnx_models
from tests.edgefl.offload.graphs import residual, rows

START_S = 400.0
X = {"x": np.ones((1, 3), np.float32)}


class Fleet:
    """A cloud's home without a cloud, as the stage server finds it."""

    def __init__(self, folder) -> None:
        self.home = folder / "cloud"
        create_home(self.home, "cloud")
        (self.home / "tls").mkdir()
        tls.create_ca(self.home / "tls")
        save_private_key(new_fleet_key(), self.home / "fleet.key")
        self.engine = open_database(self.home / "cloud.db")
        self.enrolment = Enrolment(self.engine, self.home / "tls")
        self.blobs = BlobStore(self.home / "blobs")

    def enrol(self, folder, name) -> Identity:
        identity = Identity(folder / f"{name}.key", folder / f"{name}.pem", self.home / "tls" / "ca.pem")
        secret, _ = tls.parse_token(self.enrolment.new_token())
        identity.cert.write_bytes(self.enrolment.enroll(secret, name, {}, tls.new_request(identity, name)))
        return identity

    def publish(self, model, onnx) -> str:
        blob = self.blobs.put(onnx)
        Registry(self.engine, self.blobs, load_private_key(self.home / "fleet.key")).publish(model, blob, {})
        return blob.sha256


@pytest.fixture
def fleet(tmp_path):
    one = Fleet(tmp_path)
    yield one
    one.engine.dispose()


@contextlib.contextmanager
def running(fleet, port, *options):
    """Run the command; yields the process and a function that waits for a line of its log."""
    command = [sys.executable, "-m", "edgefl", "cloud", "stages", *options, "--home", str(fleet.home)]
    log = fleet.home / "stages.log"
    with log.open("wb") as out:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=out, stderr=out)

    def logged(text, count=1) -> str:
        end_s = time.monotonic() + START_S
        while (seen := log.read_text()).count(text) < count:
            assert process.poll() is None, seen
            assert time.monotonic() < end_s, f"no {text!r} in {seen}"
            time.sleep(0.05)
        return seen

    try:
        logged("stages.ready")
        yield process, logged
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(START_S)
    assert process.returncode == 0, log.read_text()


def stub_of(port, identity):
    return InferenceStub(grpc.secure_channel(f"127.0.0.1:{port}", tls.grpc_channel_credentials(identity)))


def test_a_fleet_s_release_over_mutual_tls_and_what_happens_when_parts_of_it_end(
    fleet, tmp_path, free_port, alive, eventually
) -> None:
    digest = fleet.publish("affine", onnx_models.affine())
    identity, other = fleet.enrol(tmp_path, "cam"), fleet.enrol(tmp_path, "other")
    with running(fleet, free_port, "affine:1") as (_, logged):
        stub = stub_of(free_port, identity)
        request = make_request("affine", X)
        request.parameters["release_digest"].string_param = digest
        assert response_tensors(stub.ModelInfer(request, timeout=60))["y"].tolist() == [[3.0] * 3]
        text = logged("stage.up")
        child = int(text.split("pid=")[1].split()[0])
        os.kill(child, signal.SIGKILL)
        logged("stage.up", 2)
        assert response_tensors(stub.ModelInfer(request, timeout=60))["y"].tolist() == [[3.0] * 3]
        open_stream = stub.ModelStreamInfer(iter(_endless(request)))
        assert not next(open_stream).error_message
        fleet.enrolment.remove("cam")
        with pytest.raises(grpc.RpcError, match=r"was removed from the fleet|Socket closed|not enrolled"):
            for _ in open_stream:
                pass
        with pytest.raises(grpc.RpcError, match=r"device 'cam' is not enrolled|Socket closed"):
            stub.ModelInfer(request, timeout=60)
        assert stub_of(free_port, other).ModelInfer(request, timeout=60)
        child = int(logged("stage.up", 2).rsplit("pid=", 1)[1].split()[0])
        stranger = tmp_path / "stranger"
        stranger.mkdir()
        tls.create_ca(stranger)
        theirs = Identity(stranger / "k", stranger / "c", fleet.home / "tls" / "ca.pem")
        theirs.cert.write_bytes(tls.sign_request(stranger, tls.new_request(theirs, "cam"), "cam"))
        with pytest.raises(grpc.RpcError) as refused:
            stub_of(free_port, theirs).ModelInfer(request, timeout=20)
        assert refused.value.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
        assert alive(child)
    eventually(lambda: not alive(child), "the stage's end")


def _endless(request):
    while True:
        yield request
        time.sleep(0.1)


def test_models_and_homes_that_cannot_be_served(fleet, tmp_path) -> None:
    for model, kind, words in (
        ("none.onnx", ConfigError, "there is no file none.onnx; name an .onnx file, or a release as NAME"),
        ("affine:x", ConfigError, "'affine:x' names no release; expected NAME or NAME:VERSION"),
        ("affine", NotFound, "there is no model 'affine'"),
    ):
        with pytest.raises(kind, match=words):
            StageServer(StageOptions(home=fleet.home, model=model))
    create_home(tmp_path / "empty", "cloud")
    with pytest.raises(HomeError, match="has no CA yet; start its cloud first"):
        StageServer(StageOptions(home=tmp_path / "empty", model="affine"))


def test_its_certificate_is_its_own_and_names_where_it_is_reached(fleet, tmp_path) -> None:
    path = tmp_path / "affine.onnx"
    path.write_bytes(onnx_models.affine())
    StageServer(StageOptions(home=fleet.home, model=str(path), names=("stages.example.org",)))
    folder = fleet.home / "stages" / "affine"
    hosts = hosts_of(tls.load_certificate((folder / "cert.pem").read_bytes()))
    assert {"stages.example.org", "127.0.0.1", "localhost"} <= set(hosts)
    assert (folder / "key.pem").stat().st_mode & 0o777 == 0o600


def test_cores_are_divided_evenly() -> None:
    assert divided_cores([0, 1, 2, 3], 2) == [(0, 1), (2, 3)]
    assert divided_cores([4, 5, 6], 2) == [(4,), (5, 6)]
    assert divided_cores([0], 2) == [(0,), (0,)]


def test_tritonclient_unmodified(fleet, tmp_path, free_port) -> None:
    """Its classes, over a channel with a device's certificate: metadata, one request, and a stream."""
    import queue

    import tritonclient.grpc as triton

    fleet.publish("net", residual(tmp_path / "net.onnx").read_bytes())
    identity = fleet.enrol(tmp_path, "cam")
    files = {"root_certificates": identity.ca, "private_key": identity.key, "certificate_chain": identity.cert}
    options = {name: str(path) for name, path in files.items()}
    with (
        running(fleet, free_port, "net", "--tail-from", "h", "--tail-from", "xa", "--cuts", "hb"),
        triton.InferenceServerClient(f"127.0.0.1:{free_port}", ssl=True, **options) as client,
    ):
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("net", "1")
        about = client.get_model_metadata("net.1", as_json=True)
        assert [one["name"] for one in about["inputs"]] == ["xa", "x"]
        assert [one["name"] for one in client.get_model_metadata("net", as_json=True)["inputs"]] == ["h", "x"]
        session = new_session(tmp_path / "net.onnx")
        (whole,) = session.run(["y"], {"x": rows(2)})
        hidden = np.maximum(rows(2) @ np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32), 0)
        inputs = []
        for name, array in (("x", rows(2)), ("h", hidden)):
            inputs.append(triton.InferInput(name, array.shape, "FP32"))
            inputs[-1].set_data_from_numpy(array)
        seen = client.infer("net", inputs, outputs=[triton.InferRequestedOutput("y")], client_timeout=60)
        np.testing.assert_allclose(seen.as_numpy("y"), whole, rtol=1e-5)
        answers = queue.Queue()
        client.start_stream(lambda result, error: answers.put((result, error)))
        for number in range(3):
            client.async_stream_infer("net.2", inputs, request_id=str(number))
        client.async_stream_infer("net.9", inputs, request_id="wrong")
        found = [answers.get(timeout=60) for _ in range(4)]
        client.stop_stream()
        assert [one.get_response().id for one, error in found[:3] if error is None] == ["0", "1", "2"]
        for one, _ in found[:3]:
            np.testing.assert_allclose(one.as_numpy("y"), whole, rtol=1e-5)
        assert "model 'net.9' is not on this server" in str(found[3][1])


def test_cuts_before_the_tail_and_cores_for_other_stages(fleet, tmp_path, monkeypatch) -> None:
    path = residual(tmp_path / "net.onnx")
    for options, words in (
        ({"tail_from": ("hb",), "cuts": ("h",)}, "net.onnx is cut before the tail begins, at layer 2 of 3"),
        ({"tail_from": ("none",)}, "net.onnx has no cut 'none'"),
        ({"cores": ((0,), (0,))}, "--cores is given 2 times for 1 stages; give it once for each"),
    ):
        server = StageServer(StageOptions(home=fleet.home, model=str(path), **options))
        with pytest.raises(ConfigError, match=words):
            server._specs(tmp_path)
