"""The benchmark of predictions: its requests are the protocol's, its rows say what they are of."""

from __future__ import annotations

import asyncio
import json

import pytest

from benchmarks import serving
from benchmarks.serving_load import Client, request
from edge_agent.serving.inference import parse_request
from edge_agent.sessions import LoadedModel, TensorInfo

MODEL = LoadedModel(
    "cnn", 1, (TensorInfo("input", "FP32", (-1, 1, 28, 28)),), (TensorInfo("output", "FP32", (-1, 10)),),
    inline=True, session=None,
)  # fmt: skip


@pytest.mark.parametrize("kind", ["binary", "json"])
def test_what_the_clients_send_fits_the_model(kind):
    head, body = request("/v2/models/cnn/infer", kind).split(b"\r\n\r\n", 1)
    headers = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
    assert int(headers["Content-Length"]) == len(body)
    parsed = parse_request(MODEL, body, headers.get("Inference-Header-Content-Length"))
    assert parsed.feeds["input"].shape == (1, 1, 28, 28)
    assert parsed.outputs == {"output": kind == "binary"}


def test_a_client_counts_whole_answers_and_those_that_failed():
    class Transport(asyncio.Transport):
        sent = 0

        def write(self, data):
            self.sent += 1

    client, transport = Client(b"ask"), Transport()
    client.connection_made(transport)
    client.data_received(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nab")
    assert client.times == []
    client.data_received(b"cd")
    client.data_received(b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n")
    assert (len(client.times), client.failed, transport.sent) == (2, 1, 3)


def test_rows_compare_medians():
    case = serving.CASES[1]
    ours = [{"requests": n, "seconds": 2.0, "p50_ms": 1.0} for n in (100, 400, 200)]
    theirs = [{"requests": 250, "seconds": 1.0, "p50_ms": 0.5}]
    row = serving._row(case, "bare", ours, theirs)
    assert (row.ours, row.theirs, row.ratio, row.met) == (100.0, 250.0, 0.4, False)
    p50 = serving._row(serving.CASES[0], "bare", [{"p50_ms": 0.2}], [{"p50_ms": 0.1}])
    assert (p50.ours, p50.ratio, p50.met) == (0.2, 0.5, True)
    json.dumps([row.as_json(), p50.as_json()])
