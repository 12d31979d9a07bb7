"""Relays over HTTPS: what an operator's Flower app says, and every refusal."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import httpx
import pytest

from edgefl.protocols import tls

CONTENT = b"what a message holds"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def http(http_plane):
    context = tls.client_context(http_plane.ca.cloud.ca)
    header = {"Authorization": f"Bearer {http_plane.services.operator_token}"}
    with httpx.Client(base_url=http_plane.url, verify=context, trust_env=False, headers=header) as client:
        yield client


@pytest.fixture
def relay(http, http_plane):
    bundle = dataclasses.asdict(http_plane.blobs.put(b"zip"))
    relay = http.post("/v1/relays", json={"app": "app:app", "bundle": bundle}).json()["id"]
    assert http.put(f"/v1/relays/{relay}/contents/{SHA256}", content=CONTENT).json()["size"] == len(CONTENT)
    return relay


def message(number=1, device="a", **over):
    return {"number": number, "device": device, "envelope": "e", "content": SHA256, "within_s": 60} | over


def lines_of(http, relay):
    with http.stream("GET", f"/v1/relays/{relay}/events") as answer:
        yield from (line for line in map(json.loads, answer.iter_lines()) if "heartbeat" not in line)


def test_messages_go_out_and_replies_come_back(http, http_plane, relay, play_devices):
    play_devices(lambda device, plan, content: f"{device} {plan.round} ".encode() + content, "a", "b")
    sent = http.post(f"/v1/relays/{relay}/messages", json={"messages": [message(1, "a"), message(2, "b")]})
    assert sent.json() == {"sent": 2}
    lines = lines_of(http, relay)
    assert {(line["number"], line["device"], line["lost"]) for line in (next(lines), next(lines))} == {
        (1, "a", False), (2, "b", False),
    }  # fmt: skip
    assert http.get(f"/v1/relays/{relay}/replies/2").content == b"b 2 " + CONTENT
    assert http.post(f"/v1/relays/{relay}/done", json={"numbers": [1, 2]}).json() == {"done": 2}
    assert http.get(f"/v1/relays/{relay}/replies/2").status_code == 404
    assert http.delete(f"/v1/relays/{relay}/contents/{SHA256}").json() == {"removed": SHA256}
    assert not http_plane.relays.contents(relay).has(SHA256)


def test_an_ended_relay_says_how(http, relay):
    ended = http.post(f"/v1/relays/{relay}/end", json={"state": "failed", "error": "why"}).json()
    assert (ended["state"], ended["error"]) == ("failed", "why")
    assert list(lines_of(http, relay)) == [{"state": "failed", "error": "why"}]
    assert "has ended: failed, why" in http.post(f"/v1/relays/{relay}/done", json={"numbers": [1]}).json()["error"]


def test_a_relay_is_listed_shown_and_cancelled_as_a_job(http, relay):
    [listed] = http.get("/v1/jobs").json()
    assert listed == http.get(f"/v1/jobs/{relay}").json()
    assert (listed["kind"], listed["task"], listed["state"], listed["sent"]) == ("relay", "app:app", "running", 0)
    assert "has no rounds" in http.get(f"/v1/jobs/{relay}/events").json()["error"]
    assert http.post(f"/v1/jobs/{relay}/cancel").json() == {"id": relay, "state": "cancelled"}
    assert http.post("/v1/jobs/relay-x/cancel").status_code == http.get("/v1/jobs/relay-x").status_code == 404


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"number": 0}, "number"),
        ({"device": "x" * 300}, "device"),
        ({"envelope": ""}, "envelope"),
        ({"content": "../secret"}, "content"),
        ({"content": "0" * 64}, "is missing; upload it first"),
        ({"within_s": float("inf")}, "within_s"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_bad_message_is_refused(http, relay, bad, said):
    body = json.dumps({"messages": [message(**bad)]})
    answer = http.post(f"/v1/relays/{relay}/messages", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert said in answer.json()["error"]


def test_what_a_message_holds_may_be_larger_than_other_bodies(http, http_plane, relay):
    data = bytes(3 << 20)
    sha256 = hashlib.sha256(data).hexdigest()
    assert http.put(f"/v1/relays/{relay}/contents/{sha256}", content=data).json()["size"] == len(data)
    assert http_plane.relays.contents(relay).path(sha256).read_bytes() == data


def test_a_relay_needs_its_bundle_and_contents_their_digest(http, relay, monkeypatch):
    bundle = {"sha256": "0" * 64, "size": 1}
    assert "upload it first" in http.post("/v1/relays", json={"app": "a:b", "bundle": bundle}).json()["error"]
    assert http.put(f"/v1/relays/{relay}/contents/{'0' * 64}", content=b"other").status_code == 400
    assert http.put(f"/v1/relays/{relay}/contents/..%2Fx", content=b"x").status_code in {400, 404}
    monkeypatch.setattr("cloud.http.relays.MAX_MESSAGE_BYTES", 3)
    assert http.put(f"/v1/relays/{relay}/contents/{SHA256}", content=CONTENT).status_code == 413


def test_all_of_it_is_for_the_operator(http, relay):
    for method, path in (
        ("POST", "/v1/relays"), ("PUT", f"/v1/relays/{relay}/contents/{SHA256}"), ("GET", f"/v1/relays/{relay}/events"),
        ("POST", f"/v1/relays/{relay}/messages"), ("GET", f"/v1/relays/{relay}/replies/1"),
        ("POST", f"/v1/relays/{relay}/done"), ("POST", f"/v1/relays/{relay}/end"),
        ("DELETE", f"/v1/relays/{relay}/contents/{SHA256}"),
    ):  # fmt: skip
        assert http.request(method, path, headers={"Authorization": "Bearer no"}).status_code == 401
