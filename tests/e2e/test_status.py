"""`cloud status`, `agent status` and tokens, with real processes over TLS."""

from __future__ import annotations

import contextlib
import json

import pytest

from edgefl.errors import ProcessFailed


def test_how_a_cloud_and_a_device_are(embedded_fleet, tmp_path, eventually):
    fleet, facts = embedded_fleet, tmp_path / "facts.json"

    def status(program, home, *, fails=False):
        if fails:
            with pytest.raises(ProcessFailed):
                fleet.command(program, "status", "--home", home, "--json", facts)
        else:
            fleet.command(program, "status", "--home", home, "--json", facts)
        return json.loads(facts.read_text())

    (tmp_path / "token").write_text(fleet.token())
    home = tmp_path / "cam-1"
    fleet.command(
        "agent", "enroll", "--home", home, "--cloud", fleet.url, "--token-file", tmp_path / "token", "--name", "cam-1"
    )
    assert status("agent", home, fails=True)["running"] is False
    fleet.start_agent("cam-1").wait_for("mqtt.up")
    fleet.cloud.wait_for("device.online")

    cloud = status("cloud", fleet.home)
    assert (cloud["running"], cloud["healthy"], cloud["fault"], cloud["pid"]) == (True, True, "", fleet.cloud.pid)
    assert cloud["devices"] == {"known": 1, "online": 1}
    assert cloud["jobs"] == {"running": 0, "queued": 0, "paused": 0}
    assert cloud["ports"] == {"grpc": fleet.grpc_port, "broker": fleet.mqtt_port}
    assert (cloud["url"], set(cloud["parts"].values())) == (fleet.url, {""})
    assert cloud["certificate_expires"] < cloud["ca_expires"]

    [token] = json.loads(fleet.command("cloud", "tokens", "list", "--home", fleet.home, "--json", "-"))
    assert (token["state"], token["used_by"]) == ("used", "cam-1")

    fleet.agents["cam-1"].wait_for("agent.started")

    def is_healthy():  # it says so in a file, a moment after it is
        with contextlib.suppress(ProcessFailed):
            status("agent", home)
            return True
        return False

    eventually(is_healthy, "an agent that says that it is healthy")
    agent = status("agent", home)
    assert (agent["running"], agent["healthy"], agent["pid"]) == (True, True, fleet.agents["cam-1"].pid)
    assert (agent["broker_fault"], agent["training"]) == ("", "")
    assert agent["serving_url"].startswith("http://127.0.0.1:")

    fleet.cloud.kill()
    stopped = status("cloud", fleet.home, fails=True)
    assert (stopped["running"], stopped["fault"], stopped["pid"]) == (False, "it does not run", 0)
