"""Releases and rollouts over HTTPS."""

from __future__ import annotations

import dataclasses
import json

import httpx
import pytest

from edgefl.protocols import tls
from edgefl.protocols.messages import RolloutNote


@pytest.fixture
def http(http_plane):
    context = tls.client_context(http_plane.ca.cloud.ca)
    header = {"Authorization": f"Bearer {http_plane.services.operator_token}"}
    with httpx.Client(base_url=http_plane.url, verify=context, trust_env=False, headers=header) as client:
        yield client


@pytest.fixture
def published(http, http_plane):
    http_plane.enroll("a", "b", site="north")
    for content in (b"v1", b"v2"):
        body = {"blob": dataclasses.asdict(http_plane.blobs.put(content)), "metrics": {"accuracy": 0.9}}
        assert http.post("/v1/models/m/releases", json=body).status_code == 200


def note(plane, device, state, version=2):
    plane.rollouts.note(device, RolloutNote(model="m", version=version, state=state))


def test_releases_are_listed(http, published):
    assert [(one["model"], one["version"]) for one in http.get("/v1/models").json()] == [("m", 2), ("m", 1)]
    newest = http.get("/v1/models/m").json()[0]
    assert (newest["version"], newest["metrics"], newest["blob"]["size"]) == (2, {"accuracy": 0.9}, 2)


@pytest.mark.parametrize("metrics", ['{"a": NaN}', '{"a": Infinity}'])
def test_a_metric_that_is_no_number_is_a_400(http, http_plane, metrics):
    blob = json.dumps(dataclasses.asdict(http_plane.blobs.put(b"v")))
    body = f'{{"blob": {blob}, "metrics": {metrics}}}'
    answer = http.post("/v1/models/m/releases", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, "not a finite number" in answer.json()["error"]) == (400, True)


def test_another_signature_is_a_409_without_consent(http, http_plane):
    blob = dataclasses.asdict(http_plane.blobs.put(b"v"))
    body = {"blob": blob, "sample": blob, "inputs": {"x": "FP32[-1,3]"}, "outputs": {"y": "FP32[-1,2]"}}
    assert http.post("/v1/models/m/releases", json=body).json()["sample"] == blob
    other = body | {"outputs": {"z": "FP32[-1,2]"}}
    answer = http.post("/v1/models/m/releases", json=other)
    assert (answer.status_code, "allow it: --new-signature" in answer.json()["error"]) == (409, True)
    assert http.post("/v1/models/m/releases", json=other | {"new_signature": True}).json()["version"] == 2


def test_a_release_of_nothing_is_a_400(http):
    answer = http.post("/v1/models/m/releases", json={"blob": {"sha256": "0" * 64, "size": 1}})
    assert (answer.status_code, "upload it first" in answer.json()["error"]) == (400, True)


def test_an_unknown_model_is_a_404(http):
    assert http.get("/v1/models/m").status_code == 404
    assert http.post("/v1/rollouts", json={"model": "m"}).status_code == 404


def test_a_rollout_starts_and_is_shown(http, http_plane, published):
    started = http.post("/v1/rollouts", json={"model": "m"}).json()
    assert (started["version"], started["state"], len(started["devices"])) == (2, "running", 2)
    assert [device for device, _ in http_plane.link.sent] == ["a", "b"]
    assert http.get(f"/v1/rollouts/{started['id']}").json() == started
    assert http.get("/v1/rollouts").json() == [started]


def test_an_older_version_is_a_409_without_rollback(http, published):
    http.post("/v1/rollouts", json={"model": "m"})
    answer = http.post("/v1/rollouts", json={"model": "m", "version": 1})
    assert (answer.status_code, "--rollback" in answer.json()["error"]) == (409, True)
    back = http.post("/v1/rollouts", json={"model": "m", "version": 1, "rollback": True}).json()
    assert (back["version"], bool(back["rollback"])) == (1, True)


def test_a_selector_that_matches_nothing_is_a_400(http, published):
    answer = http.post("/v1/rollouts", json={"model": "m", "to": ["name:z"]})
    assert (answer.status_code, "enrolled devices: a, b" in answer.json()["error"]) == (400, True)


@pytest.mark.parametrize("path", ["/v1/rollouts/r", "/v1/rollouts/r/events"])
def test_an_unknown_rollout_is_a_404(http, path):
    assert http.get(path).status_code == 404


def test_events_tell_each_change_until_all_is_over(http, http_plane, published):
    rollout = http.post("/v1/rollouts", json={"model": "m"}).json()["id"]
    steps = iter([("a", "downloading"), ("a", "active"), ("b", "failed")])
    seen = []
    with http.stream("GET", f"/v1/rollouts/{rollout}/events", timeout=10) as answer:
        for line in answer.iter_lines():
            status = json.loads(line)
            if status == {"heartbeat": True}:
                note(http_plane, *next(steps))
            else:
                seen.append([one["state"] for one in status["devices"]])
    assert seen == [["pending", "pending"], ["downloading", "pending"], ["active", "pending"], ["active", "failed"]]
    assert status["state"] == "failed"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"use": "split:other"}, "use is 'split:other', expected auto or one of: split:h"),
        ({"placements": []}, "placements are none; expected each once"),
        ({"stages": ["nowhere"]}, "'nowhere' is no address of a stage server"),
        ({"threshold": 2.0}, "threshold is 2.0, not a finite number from 0 to 1"),
        ({"placements": [{"name": "split:h", "layers": 2, "head": {"blob": 1, "sample": 2}}]}, "expected BlobRef"),
        ({}, "part head-2 0000000000000000... is not in the cloud; upload it first"),
    ],
)
def test_a_placement_that_no_device_could_follow_is_a_400(http, http_plane, change, words):
    absent = {"sha256": "0" * 64, "size": 1}
    placement = {"name": "split:h", "layers": 2, "head": {"blob": absent, "sample": absent}, "form": "fp16"}
    offload = {"use": "split:h", "placements": [placement]} | change
    body = {"blob": dataclasses.asdict(http_plane.blobs.put(b"v")), "offload": offload}
    answer = http.post("/v1/models/m/releases", json=body)
    assert (answer.status_code, words in answer.json()["error"]) == (400, True), answer.text
    assert http.get("/v1/models").json() == []
