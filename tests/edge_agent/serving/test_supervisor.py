"""The serving process as the agent has it: killed, crashed, hung, replaced, and always there again."""

from __future__ import annotations

import asyncio
import errno
import os
import signal

import httpx
import pytest

from edge_agent.releases.model_file import ModelFile
from edge_agent.serving import supervisor as module
from edge_agent.serving.api import bind, url_of
from edge_agent.serving.supervisor import ServingCallbacks, ServingConfig, ServingSupervisor
from edgefl.errors import ProtocolError
from tests import onnx_models

LEAST = -(2**31)


class Agent:
    """What an agent has of its predictions; tests play the updater."""

    def __init__(self, folder, until, load_s=60.0) -> None:
        self.folder, self.until = folder, until
        self.heard, self.failing = [], []
        listener = bind("127.0.0.1", 0)
        self.url = url_of(listener)
        callbacks = ServingCallbacks(
            serving=self.heard.append, failing=lambda model, reason: self.failing.append((model, reason))
        )
        self.supervisor = ServingSupervisor(listener, ServingConfig(memory_mb=2000, load_s=load_s), callbacks)

    def model(self, content, name="m", version=1):
        path = self.folder / f"{name}-{version}.onnx"
        path.write_bytes(content)
        return ModelFile(name=name, version=version, path=path)

    async def serve(self, content, *, trial=False, **names):
        staged = await self.supervisor.prepare(self.model(content, **names), trial=trial)
        staged.switch()

    async def ask(self, data=(1.0,) * 3, name="m"):
        tensor = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": list(data)}
        return await self.post(name, [tensor])

    async def divide(self, a, b, name="d"):
        tensors = [
            {"name": key, "shape": [1, 1], "datatype": "INT32", "data": [value]} for key, value in (("a", a), ("b", b))
        ]
        return await self.post(name, tensors)

    async def post(self, name, tensors):
        async with httpx.AsyncClient(base_url=self.url, trust_env=False, timeout=30) as client:
            return await client.post(f"/v2/models/{name}/infer", json={"inputs": tensors})

    async def answers(self, value, **options):
        """Ask until the process is there again and the model in it."""
        while True:
            try:
                answer = await self.ask(**options)
            except httpx.TransportError:
                continue
            if answer.status_code == 200:
                assert answer.json()["outputs"][0]["data"] == [value] * 3
                return


@pytest.fixture
def on_device(tmp_path, until):
    def run(function, **options):
        async def inside():
            agent = Agent(tmp_path, until, **options)
            running = asyncio.create_task(agent.supervisor.run())
            try:
                async with asyncio.timeout(100):
                    await function(agent)
            finally:
                running.cancel()
                [ended] = await asyncio.gather(running, return_exceptions=True)
            assert isinstance(ended, asyncio.CancelledError), ended
            assert agent.supervisor.pid is None

        asyncio.run(inside())

    return run


def test_it_is_started_for_a_model_and_ends_with_its_owner(on_device, alive):
    pids = []

    async def run(agent):
        assert agent.supervisor.pid is None
        await agent.serve(onnx_models.affine(), trial=True)
        pids.append(agent.supervisor.pid)
        assert (await agent.ask()).json()["outputs"][0]["data"] == [3.0] * 3
        assert agent.supervisor.versions() == {"m": 1}

    on_device(run)
    assert not alive(pids[0])


def test_it_is_started_for_whoever_asks(on_device):
    async def run(agent):
        agent.supervisor.set_ready()
        async with httpx.AsyncClient(base_url=agent.url, trust_env=False, timeout=30) as client:
            assert (await client.get("/v2/health/live")).json() == {"live": True}
            assert (await client.get("/v2/health/ready")).status_code == 200

    on_device(run)


def test_killed_it_comes_back_with_the_same_models_on_the_same_port(on_device):
    async def run(agent):
        await agent.serve(onnx_models.affine(1.0))
        await agent.serve(onnx_models.affine(2.0), name="other", version=7)
        agent.supervisor.set_ready()
        for _ in range(2):
            killed = agent.supervisor.pid
            os.kill(killed, signal.SIGKILL)
            await agent.until(lambda killed=killed: agent.supervisor.pid not in {None, killed})
            await agent.answers(2.0)
            await agent.answers(3.0, name="other")
        assert agent.heard[-2:] == [False, True]
        assert agent.supervisor.versions() == {"m": 1, "other": 7}
        assert agent.failing == []

    on_device(run)


def test_a_crash_in_a_kernel_costs_that_request(on_device):
    async def run(agent):
        await agent.serve(onnx_models.affine())
        await agent.serve(onnx_models.divider(), name="d")
        with pytest.raises(httpx.TransportError):
            await agent.divide(LEAST, -1)
        await agent.answers(3.0)
        await agent.until(lambda: agent.heard[-1])
        while (answer := await agent.divide(9, 2)).status_code != 200:
            pass
        assert answer.json()["outputs"][0]["data"] == [4]

    on_device(run)


def test_a_release_that_keeps_ending_it_is_told_of(on_device, monkeypatch):
    monkeypatch.setattr(module, "MAX_WORK_DEATHS", 2)

    async def run(agent):
        await agent.serve(onnx_models.affine())
        await agent.serve(onnx_models.divider(), name="d", version=4)
        while not agent.failing:
            try:
                await agent.divide(LEAST, -1)
            except httpx.TransportError:
                continue
        [(model, reason)] = agent.failing
        assert (model.name, model.version) == ("d", 4)
        assert reason == "the serving process died 2 times soon after its start, while it ran model d version 4"
        await agent.answers(3.0)

    on_device(run)


def test_one_that_crashes_while_it_loads_is_given_up(on_device):
    async def run(agent):
        await agent.serve(onnx_models.affine())
        with pytest.raises(ProtocolError, match="died while it loaded"):
            await agent.serve(onnx_models.crash_at_start(), name="bad")
        await agent.answers(3.0)
        with pytest.raises(ProtocolError, match="was killed by SIGFPE"):
            await agent.serve(onnx_models.crash_at_start(), name="bad", trial=True)
        assert agent.supervisor.versions() == {"m": 1}

    on_device(run)


def test_one_that_began_to_crash_is_dropped_at_a_restart_and_the_others_serve(on_device):
    async def run(agent):
        await agent.serve(onnx_models.affine())
        await agent.serve(onnx_models.affine(), name="bad", version=2)
        agent.model(onnx_models.crash_at_start(), name="bad", version=2)  # the same file, other bytes
        os.kill(agent.supervisor.pid, signal.SIGKILL)
        await agent.until(lambda: agent.failing)
        assert agent.failing[0][1] == "the serving process died 2 times while it loaded model bad version 2"
        await agent.answers(3.0)
        assert agent.supervisor.versions() == {"m": 1}

    on_device(run)


def test_one_that_does_not_end_loading_holds_up_nobody(on_device):
    async def run(agent):
        await agent.serve(onnx_models.affine())
        slow = asyncio.create_task(agent.serve(onnx_models.endless_start(), name="slow"))
        await agent.serve(onnx_models.affine(3.0), name="quick")
        await agent.answers(4.0, name="quick")
        with pytest.raises(ProtocolError, match="was not loaded within 5 s"):
            await slow
        await agent.answers(3.0)

    on_device(run, load_s=5.0)


def test_what_is_staged_can_be_forgotten(on_device):
    async def run(agent):
        staged = await agent.supervisor.prepare(agent.model(onnx_models.affine()), trial=False)
        staged.forget()
        await agent.serve(onnx_models.affine(5.0), version=2)
        await agent.answers(6.0)
        agent.supervisor.drop("m")
        await agent.until(lambda: agent.supervisor.versions() == {})
        while (await agent.ask()).status_code == 200:
            pass

    on_device(run)


def test_staged_in_a_process_that_died_it_is_loaded_into_the_next(on_device):
    async def run(agent):
        await agent.serve(onnx_models.affine(1.0))
        staged = await agent.supervisor.prepare(agent.model(onnx_models.affine(4.0), version=2), trial=False)
        killed = agent.supervisor.pid
        os.kill(killed, signal.SIGKILL)
        await agent.until(lambda: agent.supervisor.pid not in {None, killed})
        staged.switch()
        while (await agent.ask()).json().get("model_version") != "2":
            pass
        await agent.answers(5.0)

    on_device(run)


def test_where_it_cannot_be_started_it_is_tried_again(on_device, monkeypatch):
    real, refused = module.ServingSupervisor._start, []

    def start(self, descriptor, board):
        if not refused:
            refused.append(1)
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return real(self, descriptor, board)

    monkeypatch.setattr(module.ServingSupervisor, "_start", start)

    async def run(agent):
        await agent.serve(onnx_models.affine())
        await agent.answers(3.0)
        assert refused

    on_device(run)
