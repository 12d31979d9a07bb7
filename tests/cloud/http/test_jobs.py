"""Blobs and jobs over HTTPS: streamed bytes with every refusal, and events that can be taken up again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import socket
import threading

import httpx
import numpy as np
import pytest

from edgefl.protocols import tls
from edgefl.records import EvaluationSpec, RoundOutcome


@pytest.fixture
def http(http_plane):
    context = tls.client_context(http_plane.ca.cloud.ca)
    header = {"Authorization": f"Bearer {http_plane.services.operator_token}"}
    with httpx.Client(base_url=http_plane.url, verify=context, trust_env=False, headers=header) as client:
        yield client


def job_body(plane, **over):
    parameters = plane.blobs.put_tree({"w": np.zeros(3, np.float32), "seen": np.zeros(1, np.int64)})
    parts = {"bundle": plane.blobs.put(b"zip"), "parameters": parameters}
    return {"task": "task:task", "buffers": ["seen"]} | {k: dataclasses.asdict(v) for k, v in parts.items()} | over


def finish_round(plane, job, number):
    model = plane.blobs.put_tree({"w": np.full(3, number, np.float32)})
    plane.jobs.open_round(job, number, ["a"])
    outcome = RoundOutcome(
        job=job, round=number, parameters={}, admitted=("a",), rejected={}, failed={}, missing=(), weight=1.0,
        metrics={"train_loss": 0.5}, seconds=0.1, up_bytes=1, down_bytes=2,
    )  # fmt: skip
    plane.jobs.finish_round(outcome, model, None)
    return model


def spelled(ref):
    return {"sha256": ref.sha256, "size": ref.size}


def test_a_blob_goes_up_and_comes_down(http):
    data = np.random.default_rng(0).bytes(3 << 20)
    digest = hashlib.sha256(data).hexdigest()
    answer = http.put("/v1/blobs", content=iter([data[:1000], data[1000:]]))
    assert answer.json() == {"sha256": digest, "size": len(data)}
    assert http.get(f"/v1/blobs/{digest}").content == data
    assert http.get(f"/v1/blobs/{digest}", headers={"Range": "bytes=10-19"}).content == data[10:20]


def test_a_blob_with_the_wrong_digest_is_not_stored(http, http_plane):
    answer = http.put("/v1/blobs", params={"sha256": "0" * 64}, content=b"data")
    assert (answer.status_code, "expected 0000" in answer.json()["error"]) == (400, True)
    assert list((http_plane.folder / "blobs").iterdir()) == []


@pytest.mark.parametrize("announced", [True, False])
def test_a_blob_that_is_too_large_is_not_stored(http, http_plane, announced):
    data = bytes((5 << 20) + 1)
    answer = http.put("/v1/blobs", content=data if announced else iter([data]))
    assert (answer.status_code, answer.json()["error"]) == (
        413,
        "a blob may have 5242880 bytes at most; nothing was stored",
    )
    assert list((http_plane.folder / "blobs").iterdir()) == []


@pytest.mark.parametrize("stalls", [True, False])
def test_an_upload_that_stops_half_way_leaves_nothing(http, http_plane, stalls):
    context = tls.client_context(http_plane.ca.cloud.ca)
    head = (
        "PUT /v1/blobs HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n"
        f"Authorization: Bearer {http_plane.services.operator_token}\r\n\r\nhalf"
    )
    with socket.create_connection(("127.0.0.1", http_plane.port), 5) as raw:
        stream = context.wrap_socket(raw, server_hostname="127.0.0.1")
        stream.sendall(head.encode())
        if stalls:
            assert b"408" in stream.recv(200)
        stream.close()
    http_plane.server.stop()
    assert list((http_plane.folder / "blobs").iterdir()) == []
    http_plane.server.start()


@pytest.mark.parametrize(("digest", "status"), [("0" * 64, 404), ("nothex", 400), ("..%2Fcloud.db", 404)])
def test_a_blob_that_is_not_there(http, digest, status):
    answer = http.get(f"/v1/blobs/{digest}")
    assert answer.status_code == status
    assert answer.json()["error"]


def test_a_job_is_submitted_listed_and_shown(http, http_plane):
    job = http.post("/v1/jobs", json=job_body(http_plane, config={"rounds": {"count": 2}})).json()["id"]
    assert [one["id"] for one in http.get("/v1/jobs").json()] == [job]
    finish_round(http_plane, job, 1)
    shown = http.get(f"/v1/jobs/{job}").json()
    assert (shown["state"], shown["task"], shown["config"]["rounds"]["count"]) == ("running", "task:task", 2)
    assert [one["round"] for one in shown["rounds"]] == [1]


@pytest.mark.parametrize(
    ("over", "said"),
    [
        ({"config": {"rounds": {"cuont": 3}}}, "unknown configuration key 'rounds.cuont'; known here: clients, count"),
        ({"config": {"train": {"lr": -1}}}, "train.lr=-1.0 must be above 0"),
        ({"bundle": {"sha256": "0" * 64, "size": 1}}, "bundle 0000000000000000... is not in the cloud"),
        ({"bundle": {"sha256": "../x", "size": 1}}, "not a SHA-256"),
        ({"buffers": ["none"]}, "buffers none are not among"),
        ({"surprise": 1}, "body.surprise"),
    ],
)
def test_a_job_that_cannot_run_is_refused(http, http_plane, over, said):
    answer = http.post("/v1/jobs", json=job_body(http_plane, **over))
    assert answer.status_code == 400
    assert said in answer.json()["error"]
    assert http.get("/v1/jobs").json() == []


def test_parameters_that_are_no_tree_are_refused(http, http_plane):
    body = job_body(http_plane, parameters=dataclasses.asdict(http_plane.blobs.put(b"no tree")))
    assert http.post("/v1/jobs", json=body).status_code == 400


def test_events_stream_rounds_heartbeats_and_the_end(http, http_plane):
    job = http.post("/v1/jobs", json=job_body(http_plane)).json()["id"]
    first = finish_round(http_plane, job, 1)
    seen, quiet = [], {"heartbeat": True, "waiting": None}
    with http.stream("GET", f"/v1/jobs/{job}/events") as answer:
        assert answer.headers["content-type"] == "application/x-ndjson"
        for line in answer.iter_lines():
            seen.append(json.loads(line))
            if seen[-1] == quiet and len(seen) == 2:
                second = finish_round(http_plane, job, 2)
                http_plane.jobs.end(job, "done")
    assert seen[0] == {
        "round": 1, "admitted": 1, "rejected": 0, "failed": 0, "missing": 0, "reasons": {}, "seconds": 0.1,
        "up_bytes": 1, "down_bytes": 2, "metrics": {"train_loss": 0.5}, "model": first.sha256,
    }  # fmt: skip
    rest = [one for one in seen[1:] if one != quiet]
    assert rest[0]["model"] == second.sha256
    assert rest[1] == {
        "state": "done", "error": None, "model": spelled(second), "last_evaluation": None, "stopped": None,
    }  # fmt: skip


def test_heartbeats_say_what_a_job_waits_for(http, http_plane):
    job = http.post("/v1/jobs", json=job_body(http_plane)).json()["id"]
    http_plane.jobs.waiting = lambda: "waiting for disk space in /srv: full"
    with http.stream("GET", f"/v1/jobs/{job}/events") as answer:
        assert json.loads(next(answer.iter_lines())) == {
            "heartbeat": True, "waiting": "waiting for disk space in /srv: full",
        }  # fmt: skip


def test_a_job_has_the_name_that_people_know_it_by(http, http_plane):
    named = http.post("/v1/jobs", json=job_body(http_plane, name="digits:task")).json()["id"]
    unnamed = http.post("/v1/jobs", json=job_body(http_plane)).json()["id"]
    shown = {one["id"]: one for one in http.get("/v1/jobs").json()}
    assert shown[named]["name"] == "digits:task"
    assert shown[unnamed]["name"] == shown[unnamed]["task"] == shown[named]["task"]
    assert http.post("/v1/jobs", json=job_body(http_plane, name="x" * 501)).status_code == 400


def test_events_are_taken_up_after_a_round(http, http_plane):
    job = http.post("/v1/jobs", json=job_body(http_plane)).json()["id"]
    for number in (1, 2, 3):
        finish_round(http_plane, job, number)
    http_plane.jobs.end(job, "failed", "quorum")
    lines = [json.loads(line) for line in http.get(f"/v1/jobs/{job}/events", params={"after": 2}).iter_lines()]
    assert [one.get("round") for one in lines] == [3, None]
    assert (lines[-1]["state"], lines[-1]["error"]) == ("failed", "quorum")


def test_an_event_wakes_the_stream_at_once(http, http_plane):
    object.__setattr__(http_plane.services, "heartbeat_s", 20.0)
    job = http.post("/v1/jobs", json=job_body(http_plane)).json()["id"]
    teller = threading.Timer(0.05, http_plane.jobs.end, (job, "done"))
    teller.start()
    (line,) = http.get(f"/v1/jobs/{job}/events", timeout=5).iter_lines()  # well before the heartbeat
    assert json.loads(line)["state"] == "done"
    teller.join()


def test_a_job_is_cancelled_once(http, http_plane):
    job = http.post("/v1/jobs", json=job_body(http_plane)).json()["id"]
    for _ in range(2):
        assert http.post(f"/v1/jobs/{job}/cancel").json() == {"id": job, "state": "cancelled"}


@pytest.mark.parametrize(("method", "path"), [("GET", ""), ("GET", "/events"), ("POST", "/cancel")])
def test_a_job_that_is_not_there_is_a_404(http, method, path):
    answer = http.request(method, f"/v1/jobs/job-0{path}")
    assert (answer.status_code, "no job 'job-0'" in answer.json()["error"]) == (404, True)


def test_events_after_a_negative_round_are_refused(http):
    assert http.get("/v1/jobs/j/events", params={"after": -1}).status_code == 400


def test_metrics_of_a_round_are_stored_by_the_operator_alone(http, http_plane):
    http_plane.jobs.started = lambda _job: None
    job = http.post("/v1/jobs", json=job_body(http_plane)).json()["id"]
    finish_round(http_plane, job, 1)
    path = f"/v1/jobs/{job}/rounds/1/metrics"
    assert http.put(path, json={"metrics": {"accuracy": 0.5, "f1": None}}).json() == {"kept": True}
    shown = {"train_loss": 0.5, "accuracy": 0.5, "f1": None}
    assert http.get(f"/v1/jobs/{job}").json()["rounds"][0]["metrics"] == shown
    assert http.get("/v1/jobs").json()[0]["metrics"] == shown
    assert http.put(path, json={"metrics": {}}, headers={"Authorization": "Bearer x"}).status_code == 401
    assert http.put("/v1/jobs/job-0/rounds/1/metrics", json={"metrics": {}}).status_code == 404
    assert http.put(f"/v1/jobs/{job}/rounds/2/metrics", json={"metrics": {}}).status_code == 400


@pytest.mark.parametrize(
    "metrics",
    ['{"a": NaN}', '{"a": Infinity}', '{"a": "0.5"}', '{"a": true}', '{"a\\u0007": 1.0}', f'{{"{"x" * 501}": 1.0}}',
     "[1.0]", "{" + ",".join(f'"{number}": 1.0' for number in range(201)) + "}"],
)  # fmt: skip
def test_metrics_that_could_not_be_shown_are_refused(http, http_plane, metrics):
    http_plane.jobs.started = lambda _job: None
    job = http.post("/v1/jobs", json=job_body(http_plane)).json()["id"]
    finish_round(http_plane, job, 1)
    answer = http.put(f"/v1/jobs/{job}/rounds/1/metrics", content=f'{{"metrics": {metrics}}}')
    assert answer.status_code == 400, answer.text
    assert http_plane.jobs.get(job)["rounds"][0]["metrics"] == {"train_loss": 0.5}


def test_jobs_are_found_by_what_an_operator_calls_them(http, http_plane):
    http_plane.jobs.started = lambda _job: None
    job = http.post("/v1/jobs", json=job_body(http_plane, label="first try")).json()["id"]
    relay = http_plane.relays.start("app:app", http_plane.blobs.put(b"zip"), label="first try")
    for word, found in {"first try": {job, relay}, job: {job}, relay[:8]: {relay}, "none": set()}.items():
        assert {one["id"] for one in http.get("/v1/jobs", params={"named": word}).json()} == found
    assert http.post("/v1/jobs", json=job_body(http_plane, label="a\nb")).status_code == 400


def test_a_job_says_what_its_devices_evaluate(http, http_plane):
    body = job_body(http_plane, evaluation={"directions": {"loss": False, "calls": None}})
    job = http.post("/v1/jobs", json=body).json()["id"]
    assert http_plane.jobs.load(job).evaluation == EvaluationSpec(directions={"loss": False, "calls": None})
    for wrong in ({"directions": {"m" * 201: None}}, {"directions": {str(n): True for n in range(201)}}, {}):
        assert http.post("/v1/jobs", json=body | {"evaluation": wrong}).status_code == 400
