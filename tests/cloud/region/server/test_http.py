"""A region's HTTPS plane over TLS, with its real parent: health, the CA, revocations, enrolment through it."""

from __future__ import annotations

import asyncio
import contextlib
import threading

import httpx
import pytest

from cloud.http.server import serve_http
from cloud.region.server.http import RegionServices, make_region_app
from edgefl.errors import EnrolmentRefused
from edgefl.process.version import __version__
from edgefl.protocols import tls
from edgefl.protocols.enrolling import apply_for_certificate
from edgefl.protocols.ports.http_limits import HttpLimits
from edgefl.protocols.tls import Identity
from tests.threaded import LoopThread


class RegionPlane:
    def __init__(self, plane, folder):
        folder.mkdir()
        self.identity = Identity.in_folder(folder)
        self.identity.ca.write_bytes(plane.ca.cloud.ca.read_bytes())
        secret, _ = tls.parse_token(plane.enrolment.new_token(role="region"))
        request = tls.new_request(self.identity, "north")
        self.identity.cert.write_bytes(plane.enrolment.enroll(secret, "north", {}, request, role="region"))
        self.faults = {"uplink": ""}
        self.parent_url = plane.url
        self.thread, ready = LoopThread("region https"), threading.Event()
        self._stop = None
        self._serving = asyncio.run_coroutine_threadsafe(self._serve(ready), self.thread.loop)
        assert ready.wait(20)
        self.url = f"https://127.0.0.1:{self.port}"

    async def _serve(self, ready):
        self._stop = asyncio.Event()
        services = RegionServices(
            name="north", parent_url=self.parent_url, parent_server_name="", identity=self.identity, grpc_port=1234,
            broker_url="mqtts://:5678", health=lambda: self.faults, crl=lambda: b"-----BEGIN X509 CRL-----",
            devices=lambda: {"known": 3, "online": 1},
        )  # fmt: skip
        context = tls.server_context(self.identity, client_certificates=False)
        app = make_region_app(services)
        async with serve_http(app, "127.0.0.1", 0, context, HttpLimits(max_connections=50), pytest.fail) as self.port:
            ready.set()
            await self._stop.wait()

    def client(self):
        context = tls.client_context(self.identity.ca, None, "north" + tls.REGION_DOMAIN)
        return httpx.Client(base_url=self.url, verify=context, trust_env=False)

    def close(self):
        self.thread.loop.call_soon_threadsafe(self._stop.set)
        self._serving.result(20)
        self.thread.close()


@pytest.fixture
def north(http_plane, tmp_path):
    with contextlib.closing(RegionPlane(http_plane, tmp_path / "north")) as one:
        yield one


def test_health_names_the_uplink(north):
    with north.client() as client:
        well = client.get("/v1/health")
        assert (well.status_code, well.json()["status"], well.json()["version"]) == (200, "ok", __version__)
        assert (well.json()["region"], well.json()["devices"]) == ("north", {"known": 3, "online": 1})
        north.faults["uplink"] = "no route to the cloud"
        ill = client.get("/v1/health")
        assert (ill.status_code, ill.json()["status"]) == (503, "failing")
        assert ill.json()["parts"]["uplink"] == {"ok": False, "reason": "no route to the cloud"}


def test_the_ca_and_who_serves_it(north):
    with north.client() as client:
        answer = client.get("/v1/ca")
        assert (answer.content, answer.headers["edgefl-region"]) == (north.identity.ca.read_bytes(), "north")
        assert client.get("/v1/crl").content == b"-----BEGIN X509 CRL-----"
        assert client.get("/v1/devices").status_code == 404  # it is no cloud: operators ask the cloud


def test_a_device_enrols_through_its_region(north, http_plane, tmp_path):
    keys = Identity.in_folder(tmp_path)
    token = http_plane.enrolment.new_token()
    reply = apply_for_certificate(north.url, token, "cam-1", {}, keys)
    assert (reply.server, reply.grpc_port, reply.broker) == ("north", 1234, "mqtts://:5678")
    [device] = http_plane.enrolment.devices()
    assert (device.name, device.parents) == ("cam-1", ("north",))
    with pytest.raises(EnrolmentRefused, match="was used already"):
        apply_for_certificate(north.url, token, "cam-2", {}, keys)


@pytest.mark.parametrize("body", ["", "{", "[]", "null", "7"])
def test_a_body_that_is_no_request(north, body):
    with north.client() as client:
        assert client.post("/v1/enroll", content=body).status_code in {400, 422}


def test_a_parent_that_is_away_is_said_by_name(north, http_plane, tmp_path):
    http_plane.server.stop()
    try:
        with north.client() as client:
            answer = client.post("/v1/enroll", json={"secret": "s", "name": "a", "csr": "c"})
    finally:
        http_plane.server.start()
    assert answer.status_code == 503
    assert f"region north cannot ask its parent {http_plane.url} now" in answer.json()["error"]
