"""Devices over HTTPS: the CA, enrolment with every refusal, tokens, the list, removal."""

from __future__ import annotations

import dataclasses
import json
import time

import httpx
import pytest
from cryptography import x509

from cloud.http.api import make_app
from cloud.state.store import devices
from edgefl import __version__
from edgefl.protocols import tls
from edgefl.protocols.messages import DeviceState, Telemetry
from edgefl.protocols.tls import Identity
from edgefl.terminal.text import is_safe


@pytest.fixture
def http(http_plane):
    context = tls.client_context(http_plane.ca.cloud.ca)
    header = {"Authorization": f"Bearer {http_plane.services.operator_token}"}
    with httpx.Client(base_url=http_plane.url, verify=context, trust_env=False, headers=header) as client:
        yield client


@pytest.fixture
def request_body(http_plane, tmp_path):
    def body(name="cam-1", secret=None, **over):
        secret = secret or tls.parse_token(http_plane.enrolment.new_token())[0]
        csr = tls.new_request(Identity.in_folder(tmp_path), name).decode()
        return {"secret": secret, "name": name, "tags": {"site": "north"}, "csr": csr} | over

    return body


def test_health_tells_version_and_time(http):
    answer = http.get("/v1/health").json()
    assert (answer["status"], answer["version"]) == ("ok", __version__)
    assert abs(answer["time"] - time.time()) < 60


def test_health_names_the_part_that_is_not_well(http, http_plane):
    reasons = {"link": "", "database": "cloud.db: database is locked"}
    http_plane.server.app = make_app(dataclasses.replace(http_plane.services, health=lambda: reasons))
    answer = http.get("/v1/health")
    assert answer.status_code == 503
    assert answer.json()["status"] == "failing"
    assert answer.json()["parts"] == {
        "link": {"ok": True, "reason": ""},
        "database": {"ok": False, "reason": "cloud.db: database is locked"},
    }


def test_the_ca_is_the_one_that_the_token_names(http, http_plane):
    _, fingerprint = tls.parse_token(http_plane.enrolment.new_token())
    assert tls.fingerprint(http.get("/v1/ca").content) == fingerprint


def test_enrolment_answers_with_all_that_a_device_needs(http, http_plane, request_body):
    answer = http.post("/v1/enroll", json=request_body()).json()
    assert tls.common_name(answer["certificate"].encode()) == "cam-1"
    assert answer["ca"].encode() == http_plane.services.ca_pem
    assert answer["fleet_key"].encode() == http_plane.services.fleet_key_pem
    assert (answer["grpc_port"], answer["broker"]) == (9440, "mqtts://:8883")


def test_a_reused_token_is_a_403(http, request_body):
    body = request_body()
    assert http.post("/v1/enroll", json=body).status_code == 200
    answer = http.post("/v1/enroll", json=body | {"name": "cam-2"})
    assert answer.status_code == 403
    assert "used already, by device 'cam-1'" in answer.json()["error"]


def test_an_expired_token_is_a_403(http, http_plane, request_body):
    body = request_body()
    http_plane.clock.advance(25 * 3600)
    answer = http.post("/v1/enroll", json=body)
    assert (answer.status_code, "expired" in answer.json()["error"]) == (403, True)


def test_a_wrong_token_is_a_403(http, request_body):
    answer = http.post("/v1/enroll", json=request_body(secret="x" * 43))
    assert (answer.status_code, "unknown" in answer.json()["error"]) == (403, True)


def test_a_taken_name_is_a_403_and_the_token_stays_good(http, request_body):
    http.post("/v1/enroll", json=request_body())
    second = request_body()
    answer = http.post("/v1/enroll", json=second)
    assert (answer.status_code, "enrolled already" in answer.json()["error"]) == (403, True)
    assert http.post("/v1/enroll", json=second | {"name": "cam-2"}).status_code == 200


def test_a_csr_that_is_none_is_a_400(http, request_body):
    answer = http.post("/v1/enroll", json=request_body(csr="no request"))
    assert (answer.status_code, "PKCS #10" in answer.json()["error"]) == (400, True)


def test_an_operators_token_enrols(http, request_body):
    answer = http.post("/v1/tokens", json={"valid_for_s": 60}).json()
    assert answer["valid_for_s"] == 60
    secret, _ = tls.parse_token(answer["token"])
    assert http.post("/v1/enroll", json=request_body(secret=secret)).status_code == 200


def test_a_token_without_a_lifetime_is_refused(http):
    assert http.post("/v1/tokens", json={"valid_for_s": 0}).status_code == 400


def test_the_list_joins_what_is_enrolled_and_what_is_heard(http, http_plane):
    http_plane.enroll("a", "b", site="north")
    http_plane.link.states["a"] = DeviceState(
        session=5, online=True, agent_version="0.1.0", models={"m": 2}, tags={"gpu": "no"}, serving_url="http://h:8000"
    )
    measured = Telemetry(
        cpu_count=4, cpu_percent=12.5, load_1m=0.5, ram_total_mb=8e3, ram_available_mb=6e3, disk_free_mb=4e4
    )
    http_plane.link.measured["a"] = measured
    first, second = http.get("/v1/devices").json()
    assert first.items() >= {
        "name": "a", "online": True, "models": {"m": 2}, "tags": {"site": "north", "gpu": "no"},
        "serving_url": "http://h:8000", "agent_version": "0.1.0", "telemetry": dataclasses.asdict(measured),
    }.items()  # fmt: skip
    assert (
        second.items()
        >= {"name": "b", "online": False, "models": {}, "tags": {"site": "north"}, "telemetry": None}.items()
    )


def test_the_list_of_revoked_certificates_is_for_everybody(http_plane, http):
    http_plane.enroll("a")
    (device,) = http_plane.enrolment.devices()
    http.delete("/v1/devices/a")
    answer = http.get("/v1/crl", headers={"Authorization": ""})
    (entry,) = x509.load_pem_x509_crl(answer.content)
    assert f"{entry.serial_number:x}" == device.serial


def test_a_removed_device_is_gone_everywhere(http, http_plane):
    http_plane.enroll("a")
    http_plane.link.states["a"] = DeviceState(session=5, online=True, agent_version="0.1.0")
    assert http.delete("/v1/devices/a").json() == {"removed": "a", "reassigned": []}
    assert http.get("/v1/devices").json() == []
    assert http_plane.link.states == {}
    answer = http.delete("/v1/devices/a")
    assert (answer.status_code, "no device 'a'" in answer.json()["error"]) == (404, True)


def test_no_devices_text_breaks_the_list_or_reaches_it_uncleaned(http, http_plane):
    http_plane.enroll("cam-1", "cam-2")
    hostile = {"a\x1b[2J": "b\nforged", "lone": "\ud800"}
    with http_plane.engine.begin() as db:  # as a former version may have stored it
        db.execute(devices.update().where(devices.c.name == "cam-1").values(tags=hostile))
    answer = http.get("/v1/devices")
    assert answer.status_code == 200
    assert [one["name"] for one in answer.json()] == ["cam-1", "cam-2"]
    assert answer.json()[0]["tags"] == {"a\\x1b[2J": "b forged", "lone": "\\ud800"}


NASTY = [10**22, -(10**22), 10**3999, True, float("nan"), float("inf"), "\ud800", "\x1b[2J", "\0", None, [], {}, [[]],
         {"a": {}}, "x" * 300_000, ["\x1b"], {"\x1b": "a"}, {"k" * 5000: 1}, [10**22] * 5]  # fmt: skip
BODIES = {
    "/v1/enroll": {"secret": "s", "name": "cam-9", "tags": {"a": "b"}, "csr": "c"},
    "/v1/tokens": {"valid_for_s": 5.0},
    "/v1/jobs": {
        "task": "a:b", "bundle": {"sha256": "0" * 64, "size": 1}, "parameters": {"sha256": "0" * 64, "size": 1},
        "buffers": ["b"], "config": {"rounds": {"count": 1}, "train": {"lr": 0.1}},
    },
    "/v1/models/m/releases": {"blob": {"sha256": "0" * 64, "size": 1}, "metrics": {"a": 1.0}},
    "/v1/rollouts": {"model": "m", "version": 1, "to": ["all"], "rollback": False},
    "/v1/relays": {"app": "a:b", "bundle": {"sha256": "0" * 64, "size": 1}},
    "/v1/relays/relay-1/messages": {
        "messages": [{"number": 1, "device": "d", "envelope": "e", "content": "0" * 64, "within_s": 1.0}]
    },
    "/v1/relays/relay-1/done": {"numbers": [1]},
    "/v1/relays/relay-1/end": {"state": "done", "error": "e"},
}  # fmt: skip


def places(value):
    if isinstance(value, list):
        return [(value, at) for at in range(len(value))] + [one for part in value for one in places(part)]
    if isinstance(value, dict):
        return [(value, key) for key in value] + [one for part in value.values() for one in places(part)]
    return []


@pytest.mark.parametrize("path", BODIES)
def test_no_body_is_a_defect_of_ours(http, path):
    for place in range(len(places(BODIES[path]))):
        for nasty in NASTY:
            body = json.loads(json.dumps(BODIES[path]))
            holder, key = places(body)[place]
            holder[key] = nasty
            answer = http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
            assert answer.status_code in {200, 400, 401, 403, 404}, (path, key, str(nasty)[:50], answer.text[:300])
            assert is_safe(answer.text), (path, key, str(nasty)[:50])


@pytest.mark.parametrize("body", [b"[" * 50_000, b'{"a":' * 20_000, b"9" * 5000, b"\xff\xfe", b"", b"{", b"\0"])
def test_no_bytes_are_a_defect_of_ours(http, body):
    for path in BODIES:
        answer = http.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400
        assert answer.json()["error"]


@pytest.mark.parametrize(
    "path", ["/v1/jobs/%00", "/v1/jobs/%1b%5b2J", "/v1/jobs/%ff", "/v1/jobs/job-1/events?after=10000000000000000000000",
             "/v1/relays/relay-1/replies/10000000000000000000000", "/v1/rollouts/%1b/events?within_s=nan",
             "/v1/rollouts/x/events?within_s=1e400", "/v1/models/%1b", "/v1/blobs/%1b"],
)  # fmt: skip
def test_no_address_is_a_defect_of_ours(http, path):
    answer = http.get(path)
    assert answer.status_code in {400, 404}
    assert is_safe(answer.text)


def test_the_log_of_a_device_is_for_the_operator_and_says_why_there_is_none(http, http_plane):
    http_plane.enroll("a")
    path = "/v1/devices/a/log"
    http_plane.link.states["a"] = DeviceState(session=1, online=False, agent_version="0")
    offline = http.get(path)
    assert (offline.status_code, "device a is offline" in offline.json()["error"]) == (409, True)
    assert http.get("/v1/devices/ghost/log").status_code == 404
    assert http.get(path, params={"lines": 0}).status_code == 400
    assert http.get(path, headers={"Authorization": "Bearer x"}).status_code == 401
    http_plane.link.states["a"] = DeviceState(session=2, online=True, agent_version="0", commands=["log"])
    assert http.get(path).json() == {"device": "a", "lines": ["one", "    two"], "cut": False}
