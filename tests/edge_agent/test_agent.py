"""The whole agent as a process, against a real cloud over mutual TLS, without a broker."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from edge_agent import agent as agent_module
from edge_agent.config import AgentConfig
from edge_agent.install.status import read_status
from edgefl.errors import PartFailed
from edgefl.protocols import tls

EVERYWHERE = "0.0.0.0"  # noqa: S104 - what a guard is for
SLOW = """
    import time
    import numpy as np
    from pathlib import Path
    from edgefl import FitResult, Task

    def fit(parameters, config, options):
        with open(options["log"], "a") as log:
            log.write("begin\\n")
        time.sleep(float(options.get("sleep", 0)))
        return FitResult(tree={name: np.ones_like(value) for name, value in parameters.items()}, weight=1.0)

    task = Task(name="slow", initial=dict, fit=fit)
"""


def test_a_round_without_a_broker(fleet, home, start_agent, eventually):
    fleet.plan(1)
    agent = start_agent(home, "--data", "step=2")
    fleet.wait(lambda: ("j1", 1) in fleet.updates, "the update")
    header, _ = fleet.updates["j1", 1]
    assert fleet.tree("j1", 1)["w"].tolist() == [2.0] * 4
    assert (header.weight, dict(header.metrics)) == (3.0, {"train_loss": 0.5})
    eventually(lambda: read_status(home).outbox_updates == 0, "the acknowledgement")
    agent.send_signal(signal.SIGTERM)
    assert agent.wait(10) == 0
    log = home.with_suffix(".log").read_text()
    assert "Traceback" not in log
    assert "agent.stopped device=cam-1" in log


def test_torch_and_numpy_are_not_in_the_agent(fleet, home, start_agent):
    fleet.plan(1)
    agent = start_agent(home)
    fleet.wait(lambda: fleet.updates, "the update")
    mapped = Path(f"/proc/{agent.pid}/maps").read_text()
    assert "libtorch" not in mapped
    assert "onnxruntime" not in mapped
    assert "_multiarray_umath" not in mapped


def test_an_idle_agent_is_small(fleet, home, start_agent, eventually):
    agent = start_agent(home)
    fleet.wait(lambda: "next cam-1" in fleet.calls, "the first contact")
    eventually((home / "contact").exists, "the contact")
    eventually((home / "serving").exists, "the port that serves")
    tree = [psutil.Process(agent.pid), *psutil.Process(agent.pid).children(recursive=True)]
    sizes = {process.cmdline()[-1]: process.memory_info().rss for process in tree}
    assert sum(sizes.values()) < 90e6, sizes


def test_kill_9_in_mid_upload_sends_the_same_update_again(fleet, home, start_agent, tmp_path, eventually):
    log = tmp_path / "fits"
    fleet.plan(1, code=SLOW, size=6 << 20)  # 24 MB: six chunks
    killed = []

    def kill(way: str, offset: int) -> None:
        if way == "up" and offset >= 8 << 20 and not killed:
            killed.append(agent.pid)
            agent.kill()
            agent.wait()

    fleet.before_chunk = kill
    agent = start_agent(home, "--data", f"log={log}")
    eventually(lambda: killed, "the kill")
    start_agent(home, "--data", f"log={log}")
    fleet.wait(lambda: ("j1", 1) in fleet.updates, "the update")
    assert fleet.tree("j1", 1)["w"].sum() == 6 << 20
    assert log.read_text() == "begin\n"  # it was not trained again
    assert "resume j1 1" in fleet.calls
    offsets = [int(call.split()[3]) for call in fleet.calls if call.startswith("upload")]
    assert offsets[0] == 0
    assert offsets[1] >= 8 << 20
    eventually(lambda: read_status(home).outbox_updates == 0, "the empty outbox")


def test_kill_9_in_mid_training_trains_again(fleet, home, start_agent, tmp_path, eventually, children_of, alive):
    log = tmp_path / "fits"
    fleet.plan(1, code=SLOW)
    agent = start_agent(home, "--data", f"log={log}", "--data", "sleep=30")
    eventually(log.exists, "the first fit")
    [trainer] = [child for child in children_of(agent.pid) if "trainer_main" in str(psutil.Process(child).cmdline())]
    agent.kill()
    agent.wait()
    eventually(lambda: not alive(trainer), "the trainer's end")
    start_agent(home, "--data", f"log={log}")
    fleet.wait(lambda: ("j1", 1) in fleet.updates, "the update")
    assert log.read_text() == "begin\nbegin\n"


def test_a_restarted_cloud_is_found_again(fleet, home, start_agent):
    start_agent(home)
    fleet.wait(lambda: "next cam-1" in fleet.calls, "the first contact")
    fleet.stop()
    fleet.plan(1)
    fleet.start()
    fleet.wait(lambda: ("j1", 1) in fleet.updates, "the update")


def test_the_status_tells(fleet, home, start_agent, eventually):
    start_agent(home)
    eventually(lambda: read_status(home).healthy and read_status(home).last_contact, "the contact")
    command = [sys.executable, "-m", "edgefl", "agent", "status", "--home", str(home), "--json", "-"]
    facts = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert facts["running"]
    assert facts["device"] == "cam-1"
    assert facts["last_contact"]
    assert facts["certificate_expires"]
    assert httpx.get(f"{facts['serving_url']}/v2/health/live").status_code == 200


def test_a_home_in_use_is_refused(fleet, home, start_agent, eventually):
    first = start_agent(home)
    eventually((home / "contact").exists, "the contact")
    second = start_agent(home)
    assert second.wait(20) == 1
    assert f"is in use by process {first.pid}" in home.with_suffix(".log").read_text()


def test_mutual_tls_lets_in_whom_the_fleet_knows(fleet, home, start_agent, eventually):
    start_agent(home, "--serve-host", EVERYWHERE, "--serve-tls")
    eventually((home / "serving").exists, "the port that serves")
    url = (home / "serving").read_text().replace(EVERYWHERE, "127.0.0.1")
    assert url.startswith("https://")
    name = {"sni_hostname": "cam-1.device.edgefl.internal"}
    known, stranger = (tls.client_context(home / "ca.pem", one) for one in (tls.Identity.in_folder(home), None))
    with httpx.Client(verify=known, trust_env=False, timeout=30) as client:
        assert client.get(f"{url}/v2", extensions=name).json()["name"] == "edgefl"
    other = {"sni_hostname": "cam-2.device.edgefl.internal"}
    with (
        httpx.Client(verify=known, trust_env=False, timeout=30) as client,
        pytest.raises(httpx.ConnectError, match="Hostname mismatch"),
    ):
        client.get(f"{url}/v2", extensions=other)
    with httpx.Client(verify=stranger, trust_env=False, timeout=30) as client, pytest.raises(httpx.TransportError):
        client.get(f"{url}/v2", extensions=name)


def test_a_token_lets_in_who_has_it(fleet, home, start_agent, eventually, tmp_path):
    (tmp_path / "token").write_text("a-token-of-this-device\n")
    start_agent(home, "--serve-host", EVERYWHERE, "--serve-token-file", str(tmp_path / "token"))
    eventually((home / "serving").exists, "the port that serves")
    url = (home / "serving").read_text().replace(EVERYWHERE, "127.0.0.1")
    with httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
        assert client.get("/v2/health/live").status_code == 200
        for headers in ({}, {"Authorization": "Bearer another-token-altogether"}):
            answer = client.get("/v2", headers=headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert "token" in answer.json()["error"]
        assert client.get("/v2", headers={"Authorization": "Bearer a-token-of-this-device"}).status_code == 200


def test_the_end_of_a_part_is_told_with_its_reason(home, monkeypatch, caplog):
    class Ending:
        def __init__(self, *_: object) -> None:
            pass

        async def run(self) -> None:
            raise ExceptionGroup("parts", [ExceptionGroup("link", [ZeroDivisionError("by\nzero")])])

        def close(self) -> None:
            pass

    monkeypatch.setattr(agent_module, "Agent", Ending)
    with pytest.raises(PartFailed, match=r"one of its parts failed: ZeroDivisionError\('by.nzero'\)\. See its log"):
        asyncio.run(agent_module.run_agent(AgentConfig(home=home, serve_port=0)))
    assert "agent.part_ended" in caplog.text
