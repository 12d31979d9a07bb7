"""The logs of real processes: a device's own, fetched by its cloud over TLS, and what the cloud says of a job."""

from __future__ import annotations

import json
import stat

import pytest

from edgefl.errors import ProcessFailed


def test_logs_of_a_device_and_of_a_job(embedded_fleet, tmp_path):
    fleet = embedded_fleet
    data = {"calls": tmp_path / "calls", "delta": 1, "weight": 1}
    fleet.add_agent("cam-1", **data)
    result, _ = fleet.run_task("numbers", rounds=2)
    job = result["job"]
    fleet.run_task("numbers", rounds=1)
    assert fleet.command("devices", "logs", "cam-1").count("trainer.started") == 1  # one process for both jobs
    fleet.cloud.wait_for("job.done", after=fleet.cloud.wait_for("job.done"))
    said = json.loads(fleet.command("devices", "logs", "cam-1", "--lines", "500", "--json", "-"))["lines"]
    assert [line for line in said if "agent.started device=cam-1" in line]
    assert not [line for line in said if "efl1." in line]
    assert stat.S_IMODE(fleet.home.stat().st_mode) == 0o700  # nobody else reads the logs in it
    about = json.loads(fleet.command("jobs", "logs", job, "--json", "-"))
    assert [line for line in about["lines"] if "round.done" in line and "round=2" in line]
    assert all(job in line for line in about["lines"])
    fleet.agents["cam-1"].kill()
    fleet.restart_agent("cam-1", **data)
    of_device = json.loads(fleet.command("jobs", "logs", job[:12], "--device", "cam-1", "--json", "-"))
    assert of_device["lines"], "the log of a device survives a restart of its agent"
    assert all(f"job={job}" in line for line in of_device["lines"] if not line.startswith(" "))
    fleet.agents["cam-1"].stop()
    fleet.cloud.wait_for("device.offline")
    with pytest.raises(ProcessFailed, match="device cam-1 is offline, so its log cannot be fetched"):
        fleet.command("devices", "logs", "cam-1")
