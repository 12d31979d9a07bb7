"""The REST server over real sockets: requests, errors, hot swaps, and an unmodified Triton client."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
import subprocess
import sys
import warnings
from importlib.util import find_spec

import httpx
import numpy as np
import pytest
from starlette.websockets import WebSocketDisconnect

from edge_agent import sessions
from edge_agent.serving.api import Serving, bind, url_of
from edge_agent.sessions import Models, load
from edgefl import __version__
from edgefl.errors import ConfigError
from tests import onnx_models

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it would rather have another HTTP client
    from starlette.testclient import TestClient


@pytest.fixture
def model(tmp_path, onnx_model):
    """`model(version, scale)`: a loaded version of `affine`."""

    def make(version: int = 1, scale: float = 2.0):
        path = tmp_path / f"{version}.onnx"
        path.write_bytes(onnx_model(scale))
        return load("affine", version, path)

    return make


@pytest.fixture
def serve():
    """Run a coroutine function with a client of a server over these models."""

    def run(function, *served, ready=True):
        async def inside():
            models = Models()
            for one in served:
                models.put(one)
            listener = bind("127.0.0.1", 0)
            serving = Serving(models, listener)
            serving.ready = ready
            running = asyncio.create_task(serving.run())
            try:
                async with httpx.AsyncClient(base_url=url_of(listener), trust_env=False) as client:
                    return await function(client, models)
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)

        return asyncio.run(inside())

    return run


def request(rows: int = 1) -> dict:
    data = [[1.0, 2.0, 3.0]] * rows
    return {"inputs": [{"name": "x", "shape": [rows, 3], "datatype": "FP32", "data": data}]}


def test_metadata_and_health(serve, model):
    async def run(client, _models):
        assert (await client.get("/v2")).json() == {
            "name": "edgefl", "version": __version__, "extensions": ["binary_tensor_data"],
        }  # fmt: skip
        for path in (
            "/v2/health/live",
            "/v2/health/ready",
            "/v2/models/affine/ready",
            "/v2/models/affine/versions/3/ready",
        ):
            assert (await client.get(path)).status_code == 200
        expected = {
            "name": "affine", "versions": ["3"], "platform": "onnxruntime_onnx",
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}],
            "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 3]}],
        }  # fmt: skip
        assert (await client.get("/v2/models/affine")).json() == expected
        assert (await client.get("/v2/models/affine/versions/3")).json() == expected

    serve(run, model(3))


@pytest.mark.parametrize("inline", [True, False])
def test_predictions(serve, model, inline, monkeypatch):
    if not inline:
        monkeypatch.setattr(sessions, "INLINE_S", 0.0)

    async def run(client, _models):
        for path in ("/v2/models/affine/infer", "/v2/models/affine/versions/1/infer"):
            answer = await client.post(path, json=request(2))
            assert answer.status_code == 200
            assert answer.json() == {
                "model_name": "affine", "model_version": "1",
                "outputs": [{"name": "y", "datatype": "FP32", "shape": [2, 3], "data": [3.0, 5.0, 7.0] * 2}],
            }  # fmt: skip

    serve(run, model())


def test_binary_tensors(serve, model):
    async def run(client, _models):
        x = np.array([[1, 2, 3]], np.float32)
        head = json.dumps({
            "inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "parameters": {"binary_data_size": 12}}],
            "parameters": {"binary_data_output": True},
        }).encode()  # fmt: skip
        headers = {"Inference-Header-Content-Length": str(len(head))}
        answer = await client.post("/v2/models/affine/infer", content=head + x.tobytes(), headers=headers)
        size = int(answer.headers["Inference-Header-Content-Length"])
        assert answer.headers["content-type"] == "application/octet-stream"
        assert json.loads(answer.content[:size])["outputs"][0]["parameters"] == {"binary_data_size": 12}
        assert np.frombuffer(answer.content[size:], np.float32).tolist() == [3.0, 5.0, 7.0]

    serve(run, model())


@pytest.mark.parametrize(
    ("method", "path", "status", "said"),
    [
        ("GET", "/v2/models/other", 404, "model 'other' is not on this device; it serves: affine"),
        ("GET", "/v2/models/other/ready", 404, "is not on this device"),
        ("POST", "/v2/models/other/infer", 404, "is not on this device"),
        ("POST", "/v2/models/affine/versions/9/infer", 404, "has version 1 here, not '9'"),
        ("GET", "/v3", 404, "Not Found"),
        ("GET", "/v2/models/affine/infer", 405, "Method Not Allowed"),
        ("POST", "/v2/models/affine/infer", 400, "the request is not JSON"),
    ],
)
def test_errors_are_json_with_the_right_status(serve, model, method, path, status, said):
    async def run(client, _models):
        answer = await client.request(method, path)
        assert answer.status_code == status
        assert said in answer.json()["error"]

    serve(run, model())


def test_a_wrong_shape_names_input_seen_and_wanted(serve, model):
    async def run(client, _models):
        wrong = {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}
        answer = await client.post("/v2/models/affine/infer", json=wrong)
        assert answer.status_code == 400
        assert answer.json() == {"error": "input 'x' has shape [1, 2], the model takes [-1, 3] (-1 = any)"}

    serve(run, model())


def test_compressed_and_huge_requests_are_refused(serve, model, monkeypatch):
    monkeypatch.setattr("edge_agent.serving.api.MAX_BODY_BYTES", 1000)

    async def run(client, _models):
        answer = await client.post("/v2/models/affine/infer", content=b"x", headers={"Content-Encoding": "gzip"})
        assert (answer.status_code, answer.json()["error"][:25]) == (400, "the request is compressed")
        answer = await client.post("/v2/models/affine/infer", content=b"x" * 2000)
        assert answer.status_code == 413

    serve(run, model())


def test_not_ready_until_releases_are_loaded(serve):
    async def run(client, _models):
        assert (await client.get("/v2/health/live")).status_code == 200
        assert (await client.get("/v2/health/ready")).status_code == 503
        assert (await client.post("/v2/models/affine/infer", json=request())).status_code == 503

    serve(run, ready=False)


def test_no_request_fails_while_versions_are_swapped(serve, model):
    async def run(client, models):
        answers = []

        async def ask() -> None:
            while not swapped.is_set():
                answer = await client.post("/v2/models/affine/infer", json=request())
                answers.append(
                    (answer.status_code, answer.json()["model_version"], answer.json()["outputs"][0]["data"][0])
                )

        swapped = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(4):
                tasks.create_task(ask())
            for version in range(2, 8):
                models.put(await asyncio.to_thread(model, version, float(version)))
                await asyncio.sleep(0.03)
            swapped.set()
        assert {status for status, _, _ in answers} == {200}
        assert {data == int(version) + 1.0 for _, version, data in answers[50:]} <= {True}
        assert len({version for _, version, _ in answers}) > 3

    serve(run, model(1, 1.0))


@pytest.mark.parametrize(
    "content",
    [
        b'{"inputs": [{"name": [], "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]}',
        b'{"inputs": [{"name": "x", "shape": [1, 3], "datatype": {}, "data": [1, 2, 3]}]}',
        b'{"inputs": [{"name": "\\ud800", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}]}',
        b'{"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 1%s]}]}' % (b"0" * 4299),
        b'{"inputs": [{"name": "x", "shape": [1%s, 3], "datatype": "FP32", "data": []}]}' % (b"0" * 4299),
        b'{"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": %s}]}' % (b"[" * 900 + b"]" * 900),
        b"[" * 200_000,
        b'{"a":' * 200_000,
    ],
)
def test_hostile_requests_are_answered_in_json(serve, model, content):
    async def run(client, _models):
        answer = await client.post("/v2/models/affine/infer", content=content)
        assert answer.status_code == 400
        assert answer.headers["content-type"] == "application/json"
        assert set(answer.json()) == {"error"}
        assert (await client.post("/v2/models/affine/infer", json=request())).status_code == 200

    serve(run, model())


def test_a_fault_of_ours_is_answered_in_json_and_logged(serve, model, caplog):
    broken = dataclasses.replace(model(), session=None, inline_session=None)

    async def run(client, _models):
        answer = await client.post("/v2/models/affine/infer", json=request())
        assert answer.status_code == 500
        assert answer.json() == {"error": "internal error of this server; see its log"}

    serve(run, broken)
    assert "AttributeError" in caplog.text


def test_no_answer_waits_for_an_acknowledgement():
    async def inside():
        accepted = asyncio.get_running_loop().create_future()

        class Accepts(asyncio.Protocol):
            def connection_made(self, transport):
                accepted.set_result(
                    transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                )
                transport.close()

        listener = bind("127.0.0.1", 0)
        server = await asyncio.get_running_loop().create_server(Accepts, sock=listener)
        _, writer = await asyncio.open_connection(*listener.getsockname())
        assert await accepted
        writer.close()
        server.close()

    asyncio.run(inside())


def test_a_computation_that_takes_too_long_is_stopped(serve, tmp_path, monkeypatch):
    monkeypatch.setattr("edge_agent.serving.api.REQUEST_S", 0.2)
    (tmp_path / "loop.onnx").write_bytes(onnx_models.counter())
    endless = {"inputs": [{"name": "times", "shape": [], "datatype": "INT64", "data": [2**40]}]}

    async def run(client, _models):
        slow = [asyncio.create_task(client.post("/v2/models/loop/infer", json=endless)) for _ in range(3)]
        assert (await client.get("/v2/health/live")).status_code == 200
        for answer in await asyncio.gather(*slow):
            assert (answer.status_code, answer.json()["error"][:27]) == (504, "the prediction took longer ")
        few = {"inputs": [{"name": "times", "shape": [], "datatype": "INT64", "data": [3]}]}
        assert (await client.post("/v2/models/loop/infer", json=few)).json()["outputs"][0]["data"] == [3.0]

    serve(run, load("loop", 1, tmp_path / "loop.onnx"))


def test_more_than_can_wait_are_sent_away(serve, tmp_path, monkeypatch):
    monkeypatch.setattr("edge_agent.serving.api.MAX_WAITING", 2)
    monkeypatch.setattr("edge_agent.serving.api.REQUEST_S", 1.0)
    (tmp_path / "loop.onnx").write_bytes(onnx_models.counter())
    endless = {"inputs": [{"name": "times", "shape": [], "datatype": "INT64", "data": [2**40]}]}

    async def run(client, _models):
        answers = await asyncio.gather(*(client.post("/v2/models/loop/infer", json=endless) for _ in range(5)))
        assert sorted(answer.status_code for answer in answers) == [503, 503, 503, 504, 504]
        assert {answer.headers.get("retry-after") for answer in answers if answer.status_code == 503} == {"1"}

    serve(run, load("loop", 1, tmp_path / "loop.onnx"))


def test_half_a_body_has_a_deadline(serve, model, monkeypatch):
    monkeypatch.setattr("edge_agent.serving.api.BODY_S", 0.1)

    async def run(client, _models):
        reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
        writer.write(b'POST /v2/models/affine/infer HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"inputs"')
        answer = await reader.read()
        writer.close()
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b'{"error": "the request was incomplete after 0.1 s"}' in answer
        assert (await client.post("/v2/models/affine/infer", json=request())).status_code == 200

    serve(run, model())


def test_large_bodies_together_have_a_limit(serve, model, monkeypatch):
    monkeypatch.setattr("edge_agent.serving.api.MAX_RECEIVED_BYTES", 300_000)

    async def run(client, _models):
        answer = await client.post("/v2/models/affine/infer", content=b" " * 1_000_000)
        assert (answer.status_code, answer.headers["connection"]) == (503, "close")

    serve(run, model())


def test_any_asgi_server_or_client_can_hold_the_application(model):
    models = Models()
    models.put(model())
    with bind("127.0.0.1", 0) as listener:
        serving = Serving(models, listener)
        with TestClient(serving.app()) as client:
            assert client.get("/v2/health/ready").status_code == 503
            serving.ready = True
            assert client.get("/v2/health/ready/").json() == {"ready": True}
            assert client.head("/v2").content == b""
            with pytest.raises(WebSocketDisconnect), client.websocket_connect("/v2"):
                pass


def test_a_port_in_use_is_named():
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: another program .*--serve-port"):
            bind("127.0.0.1", port)


@pytest.mark.skipif(
    not (find_spec("tritonclient") and find_spec("gevent")), reason="tritonclient[http] is not installed"
)
def test_an_unmodified_triton_client(serve, model):
    script = """
import sys
import numpy as np
import tritonclient.http as triton
client = triton.InferenceServerClient(sys.argv[1])
assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("affine")
assert client.get_server_metadata()["name"] == "edgefl"
assert client.get_model_metadata("affine")["inputs"][0]["shape"] == [-1, 3]
for binary in (True, False):
    for outputs in (None, [triton.InferRequestedOutput("y", binary_data=binary)]):
        x = triton.InferInput("x", [2, 3], "FP32")
        x.set_data_from_numpy(np.ones((2, 3), np.float32), binary_data=binary)
        result = client.infer("affine", [x], outputs=outputs, model_version="1", request_id="7")
        assert result.as_numpy("y").tolist() == [[3.0] * 3] * 2
        assert result.get_response()["id"] == "7"
try:
    client.get_model_metadata("other")
except triton.InferenceServerException as error:
    assert "is not on this device" in str(error), error
else:
    raise AssertionError
client.close()
"""

    async def run(client, _models):
        command = [sys.executable, "-c", script, client.base_url.netloc.decode()]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    serve(run, model())
