"""The HTTPS plane as a whole: who may pass, and that every error is JSON with a fitting status."""

from __future__ import annotations

import ssl

import httpx
import pytest

from edgefl.protocols import tls


@pytest.fixture
def http(http_plane):
    context = tls.client_context(http_plane.ca.cloud.ca)
    with httpx.Client(base_url=http_plane.url, verify=context, trust_env=False) as client:
        yield client


GUARDED = [
    ("GET", "/v1/status"),
    ("GET", "/v1/devices"),
    ("GET", "/v1/regions"),
    ("POST", "/v1/devices/assign"),
    ("GET", "/v1/devices/a/log"),
    ("DELETE", "/v1/devices/a"),
    ("POST", "/v1/tokens"),
    ("PUT", "/v1/blobs"),
    ("GET", "/v1/blobs/" + "0" * 64),
    ("POST", "/v1/jobs"),
    ("GET", "/v1/jobs"),
    ("GET", "/v1/jobs/j"),
    ("GET", "/v1/jobs/j/log"),
    ("PUT", "/v1/jobs/j/rounds/1/metrics"),
    ("GET", "/v1/jobs/j/events"),
    ("POST", "/v1/jobs/j/cancel"),
    ("POST", "/v1/jobs/j/pause"),
    ("POST", "/v1/jobs/j/resume"),
    ("POST", "/v1/jobs/j/continue"),
    ("GET", "/v1/jobs/j/devices"),
    ("POST", "/v1/models/m/releases"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/m"),
    ("POST", "/v1/rollouts"),
    ("GET", "/v1/rollouts"),
    ("GET", "/v1/rollouts/r"),
    ("GET", "/v1/rollouts/r/events"),
]
BODIES = {
    "/v1/tokens": {},
    "/v1/jobs": {"task": "t:t", "bundle": {"sha256": "", "size": 0}, "parameters": {"sha256": "", "size": 0}},
    "/v1/models/m/releases": {"blob": {"sha256": "", "size": 0}},
    "/v1/rollouts": {"model": "m"},
}


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer", "Basic operator's own", "operator's own"])
def test_nothing_of_the_operators_answers_without_the_token(http, header):
    for method, path in GUARDED:
        body = BODIES.get(path) if method == "POST" else None
        answer = http.request(method, path, json=body, headers={"Authorization": header} if header else {})
        assert answer.status_code == 401, (method, path, answer.text)
        assert "--credentials" in answer.json()["error"]


def test_every_guarded_route_is_in_the_list(http_plane):
    from cloud.http import fleet as http_fleet
    from cloud.http import job_control as http_job_control
    from cloud.http import jobs as http_jobs
    from cloud.http import models as http_models

    routers = (http_fleet.operator, http_job_control.operator, http_jobs.operator, http_models.operator)
    seen = {(method, route.path) for router in routers for route in router.routes for method in route.methods}
    assert len(seen) == len(GUARDED)


def test_the_token_opens(http, http_plane):
    header = {"Authorization": f"bearer {http_plane.services.operator_token}"}
    assert http.get("/v1/devices", headers=header).json() == []


@pytest.mark.parametrize("path", ["/", "/docs", "/redoc", "/openapi.json", "/v1", "/v2/health"])
def test_an_unknown_path_is_a_404_in_json(http, path):
    answer = http.get(path)
    assert (answer.status_code, answer.json()) == (404, {"error": "Not Found"})


def test_a_wrong_method_is_a_405_in_json(http):
    answer = http.post("/v1/health")
    assert (answer.status_code, answer.json()) == (405, {"error": "Method Not Allowed"})


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "JSON"),
        (b"[]", "body"),
        (b"{}", "body.secret: Field required"),
        (b'{"secret": "s", "name": "a", "csr": "c", "surprise": 1}', "body.surprise: Extra inputs are not permitted"),
        (b'{"secret": "s", "name": "a", "csr": "c", "tags": {"k": 1}}', "body.tags.k"),
    ],
)
def test_a_body_that_is_not_what_was_asked_is_a_400_that_names_the_fault(http, body, said):
    answer = http.post("/v1/enroll", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert said in answer.json()["error"]


def test_a_body_that_is_too_large_is_refused_before_it_is_read(http):
    answer = http.post("/v1/enroll", content=b" " * (3 << 20), headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()) == (413, {"error": "the request's body is above 1048576 bytes"})


def test_a_defect_is_a_500_that_tells_no_secrets(http, http_plane, monkeypatch):
    def break_down():
        raise RuntimeError("secret")

    monkeypatch.setattr(http_plane.enrolment, "devices", break_down)
    answer = http.get("/v1/devices", headers={"Authorization": f"Bearer {http_plane.services.operator_token}"})
    assert (answer.status_code, answer.json()) == (
        500,
        {"error": "the request triggered a bug in the cloud; see its log"},
    )


def test_a_client_that_does_not_know_the_ca_does_not_connect(http_plane, strange_ca):
    context = tls.client_context(strange_ca.cloud.ca)
    with (
        httpx.Client(verify=context, trust_env=False) as client,
        pytest.raises(httpx.ConnectError, match="certificate verify failed"),
    ):
        client.get(f"{http_plane.url}/v1/health")


def test_tls_below_1_3_is_refused(http_plane):
    context = tls.client_context(http_plane.ca.cloud.ca)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with (
        httpx.Client(verify=context, trust_env=False) as client,
        pytest.raises(httpx.ConnectError, match="SSL"),
    ):
        client.get(f"{http_plane.url}/v1/health")
