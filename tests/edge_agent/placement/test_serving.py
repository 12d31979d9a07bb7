"""A placed model at the device's HTTP endpoint: as any other, with the placement in the response's parameters."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

import httpx
import numpy as np

from edge_agent.placement.serving import PlacedServing, load_serving
from edge_agent.serving import Serving, bind
from edge_agent.serving.api import url_of
from edge_agent.serving.wire import TailAccess
from edge_agent.sessions import Models
from tests.edge_agent.placement.conftest import SPLIT, inputs
from tests.edge_agent.placement.test_loading import PLACED, request, slot  # noqa: F401 - a fixture


@asynccontextmanager
async def endpoint(model):
    listener = bind("127.0.0.1", 0)
    url = url_of(listener)
    serving = Serving(Models(), listener)
    serving.placed["m"], serving.ready = model, True
    task = asyncio.create_task(serving.run())
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        yield client, serving
    task.cancel()
    await asyncio.wait([task])


def body(rows=1, **more):
    x = inputs(rows)["x"]
    tensor = {"name": "x", "datatype": "FP32", "shape": list(x.shape), "data": x.ravel().tolist()}
    return {"inputs": [tensor], **more}


def test_requests_as_json_and_what_the_response_says(placed, expected) -> None:
    async def run():
        async with placed() as (model, server, _), endpoint(model) as (client, _):
            for rows in (1, 3, 1):
                response = await client.post("/v2/models/m/infer", json=body(rows, id="7"))
                answer = response.json()
                assert response.status_code == 200, answer
                assert (answer["id"], answer["parameters"]) == ("7", {"placement": "split:Relu_h"})
                seen = np.reshape(answer["outputs"][0]["data"], (rows, 3))
                np.testing.assert_allclose(seen, expected("whole", inputs(rows)), rtol=1e-4)
            about = (await client.get("/v2/models/m")).json()
            assert [one["name"] for one in about["inputs"]] == ["x"]
            assert (await client.get("/v2/models/m/ready")).status_code == 200
            server.fault = "INTERNAL"
            answer = (await client.post("/v2/models/m/infer", json=body())).json()
            assert answer["parameters"]["placement"] == "fallback"
            assert answer["parameters"]["fallback_reason"] == "INTERNAL: as the test wishes"
            stats = (await client.get("/v2/models/m/stats")).json()["model_stats"][0]
            assert (stats["placement"]["remote"], stats["placement"]["fallback"]) == (3, 1)
            assert (await client.get("/v2/models/n/stats")).status_code == 404

    asyncio.run(run())


def test_binary_requests_also_from_the_cache(placed, expected) -> None:
    async def run():
        async with placed() as (model, _, _), endpoint(model) as (client, _):
            x = inputs()["x"]
            tensor = {"name": "x", "datatype": "FP32", "shape": [1, 4], "parameters": {"binary_data_size": x.nbytes}}
            head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True, "timeout": 10**7}})
            headers = {"Inference-Header-Content-Length": str(len(head))}
            for _ in range(3):
                response = await client.post("/v2/models/m/infer", content=head.encode() + x.tobytes(), headers=headers)
                size = int(response.headers["inference-header-content-length"])
                assert json.loads(response.content[:size])["parameters"] == {"placement": "split:Relu_h"}
                seen = np.frombuffer(response.content[size:], np.float32)
                np.testing.assert_allclose(seen, expected("whole", inputs())[0], rtol=1e-4)
            assert len(model.cached_headers) == 1

    asyncio.run(run())


def test_bad_requests_deadlines_and_no_answer(placed) -> None:
    async def run():
        async with placed(fallback=None) as (model, server, _), endpoint(model) as (client, _):
            for wrong, words in (
                (body(parameters={"timeout": -1}), "parameter 'timeout' is -1; expected microseconds"),
                (body(parameters={"timeout": "5"}), "parameter 'timeout' is '5'"),
                ({"inputs": []}, "inputs missing: x"),
            ):
                response = await client.post("/v2/models/m/infer", json=wrong)
                assert response.status_code == 400
                assert words in response.json()["error"]
            server.delay_s = 60
            response = await client.post("/v2/models/m/infer", json=body(parameters={"timeout": 300_000}))
            assert response.status_code == 503
            assert "did not answer, and it has no fall-back: no answer within" in response.json()["error"]
            assert response.headers["retry-after"]

    asyncio.run(run())


def test_what_the_serving_process_loads(slot) -> None:  # noqa: F811
    loaded = load_serving(request(slot), TailAccess(device="cam"))
    assert isinstance(loaded, PlacedServing)
    assert (loaded.name, loaded.sample["x"].shape) == ("m", (1, 4))
    told = []
    keeper = loaded.keeper(None, lambda *facts: told.append(facts))
    keeper._tell({"placement": "x"})
    ((model, version, facts, profile),) = told
    assert (model, version, facts) == ("m", 4, {"placement": "x"})
    assert profile.keys() == {SPLIT.name}
    assert PLACED.placements == [SPLIT.name]
