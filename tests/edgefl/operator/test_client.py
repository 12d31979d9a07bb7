"""The client against a real cloud: every call, and what each way of failing is called."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import numpy as np
import pytest

from edgefl.config import JobConfig
from edgefl.errors import CloudRefused, CloudUnreachable, NotFound, ProtocolError
from edgefl.operator import client as client_module
from edgefl.operator.client import CloudClient, Credentials, load_credentials
from edgefl.protocols import tls
from edgefl.protocols.messages import BlobRef

OTHERS = "another's"


@pytest.fixture
def credentials(http_plane):
    return load_credentials(http_plane.credentials)


@pytest.fixture
def client(credentials):
    with CloudClient(None, credentials) as one:
        yield one


def test_health(client):
    assert client.health()["status"] == "ok"


def test_devices_and_tokens(client, http_plane):
    http_plane.enroll("a")
    assert [one["name"] for one in client.devices()] == ["a"]
    client.remove_device("a")
    assert client.devices() == []
    assert tls.parse_token(client.new_token(60))[0]


def test_blobs_from_bytes_and_files(client):
    data = np.random.default_rng(0).bytes(3 << 20)
    digest = hashlib.sha256(data).hexdigest()
    assert client.put_blob(data, digest) == BlobRef(sha256=digest, size=len(data))
    assert client.put_blob(io.BytesIO(data), digest).sha256 == digest
    down = io.BytesIO()
    client.get_blob(digest, down)
    assert down.getvalue() == data


def test_a_blob_that_changed_on_the_way_is_refused(client):
    with pytest.raises(CloudRefused, match="nothing was stored") as caught:
        client.put_blob(b"data", "0" * 64)
    assert caught.value.status == 400


def test_a_blob_too_large_is_refused_with_the_clouds_words(client):
    data = bytes(12 << 20)
    with pytest.raises(CloudRefused, match="at most") as caught:
        client.put_blob(io.BytesIO(data), hashlib.sha256(data).hexdigest())
    assert caught.value.status == 413


def test_a_job_from_submission_to_its_end(client, http_plane):
    parts = [http_plane.blobs.put(b"zip"), http_plane.blobs.put_tree({"w": np.zeros(1, np.float32)})]
    job = client.submit_job("t:t", *parts, ("w",), JobConfig())
    assert [one["id"] for one in client.jobs()] == [job]
    assert client.job(job)["config"] == dataclasses.asdict(JobConfig())
    assert client.cancel_job(job)["state"] == "cancelled"
    (end,) = client.job_events(job)
    assert end["state"] == "cancelled"


def test_models_and_rollouts(client, http_plane):
    http_plane.enroll("a")
    release = client.publish("m", http_plane.blobs.put(b"onnx"), {"accuracy": 0.5})
    assert release["version"] == 1
    assert client.models() == client.model("m")
    started = client.start_rollout("m", to=["name:a"])
    assert client.rollout(started["id"]) == started
    assert client.rollouts() == [started]
    assert next(client.rollout_events(started["id"])) == started
    assert [one["state"] for one in client.rollout_events(started["id"], 0)] == ["running"]


@pytest.mark.parametrize(
    "ask",
    [
        lambda c: c.job("job-0"),
        lambda c: c.model("m"),
        lambda c: c.rollout("r"),
        lambda c: c.remove_device("a/../b"),
        lambda c: c.get_blob("0" * 64, io.BytesIO()),
        lambda c: next(c.job_events("job-0")),
    ],
)
def test_what_the_cloud_does_not_have_is_not_found(client, ask):
    with pytest.raises(NotFound):
        ask(client)


def test_a_wrong_token_is_refused_and_says_what_to_give(credentials):
    with (
        CloudClient(None, dataclasses.replace(credentials, token=OTHERS)) as client,
        pytest.raises(CloudRefused, match="--credentials") as caught,
    ):
        client.devices()
    assert caught.value.status == 401


def test_another_fleets_ca_is_not_trusted(credentials, strange_ca):
    other = dataclasses.replace(credentials, ca=strange_ca.cloud.ca.read_text())
    with CloudClient(None, other) as client, pytest.raises(CloudUnreachable, match="certificate verify failed"):
        client.health()


def test_nobody_there_says_what_to_check(credentials, free_port):
    with (
        CloudClient(f"https://127.0.0.1:{free_port}", credentials) as client,
        pytest.raises(CloudUnreachable, match=r"127\.0\.0\.1:\d+ did not answer.*Check that the cloud runs"),
    ):
        client.devices()


def test_http_to_a_cloud_with_tls_is_told_to_use_https(credentials, http_plane):
    url = http_plane.url.replace("https://", "http://")
    with CloudClient(url, credentials) as client, pytest.raises(CloudUnreachable) as caught:
        client.devices()
    assert f"The server uses TLS: use {http_plane.url}" in str(caught.value)


def test_https_to_a_cloud_without_tls_is_told_to_use_http(credentials):
    class Plain(BaseHTTPRequestHandler):
        def log_message(self, *_):
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Plain) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        place = f"127.0.0.1:{server.server_port}"
        with CloudClient(f"https://{place}", credentials) as client, pytest.raises(CloudUnreachable) as caught:
            client.devices()
        server.shutdown()
    assert f"The server does not use TLS, like a cloud that was started with --insecure: use http://{place}" in str(
        caught.value
    )


def test_a_silent_server_is_not_waited_for_for_ever(credentials, monkeypatch):
    monkeypatch.setattr(client_module, "CONNECT_S", 0.2)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        CloudClient(f"https://127.0.0.1:{silent.getsockname()[1]}", credentials) as client,
        pytest.raises(CloudUnreachable),
    ):
        client.health()


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", ProtocolError),
        (b"HTTP/1.1 500 Oops\r\n\r\n", CloudRefused),
    ],
)
def test_a_server_that_is_no_cloud_is_named_so(answer, kind):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            peer, _ = server.accept()
            with peer:
                peer.recv(4096)
                peer.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        nothing = Credentials(url=f"http://127.0.0.1:{server.getsockname()[1]}", token=OTHERS, ca="")
        with CloudClient(None, nothing) as client, pytest.raises(kind, match="is it an edgefl cloud"):
            client.health()
        thread.join()


ANSWERS = {
    b'{"id": "\\u001b[2Jjob\\nforged"}': "\\x1b[2Jjob forged",
    b'{"id": "lone \\ud800"}': "lone \\ud800",
}


@pytest.fixture
def saying():
    """`saying(body)`: a client of something that answers every request with these bytes."""
    with contextlib.ExitStack() as left:

        def make(body: bytes, status: int = 200) -> CloudClient:
            client = left.enter_context(CloudClient("http://127.0.0.1:1", Credentials(url="", token=OTHERS, ca="")))
            client._http = httpx.Client(
                base_url="http://cloud", transport=httpx.MockTransport(lambda _: httpx.Response(status, content=body))
            )
            return client

        yield make


@pytest.mark.parametrize("body", ANSWERS)
def test_text_from_the_cloud_is_cleaned_where_it_enters(saying, body):
    assert saying(body).job("j") == {"id": ANSWERS[body]}
    assert list(saying(body).job_events("j")) == [{"id": ANSWERS[body]}]


@pytest.mark.parametrize("body", [b"[" * 50_000, b"9" * 5000, b"\xff", b"nonsense", b"", b"3", b"[3]", b'"x"'])
def test_whatever_answers_is_told_in_one_line(saying, body):
    for ask in (lambda c: c.job("j"), lambda c: c.devices(), lambda c: c.health(), lambda c: c.put_blob(b"", "0" * 64)):
        with pytest.raises(ProtocolError, match=r"^[^\n\x1b]+$"):
            ask(saying(body))
    with pytest.raises(CloudRefused, match=r"^[^\n\x1b]+$"):
        saying(b'{"error": "no\\n\\u001b[2J"}', 400).devices()
