"""`edgefl devices`, as it is typed."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from edgefl.app.cli import cli
from edgefl.errors import NotFound
from edgefl.protocols.messages import DeviceState, Telemetry


@pytest.fixture
def edgefl(http_plane):
    def invoke(*arguments):
        return CliRunner(mix_stderr=False).invoke(
            cli, [str(one) for one in arguments], env={"EDGEFL_CREDENTIALS": str(http_plane.credentials)}
        )

    return invoke


def test_devices_are_listed_and_removed(edgefl, http_plane):
    assert "no device is enrolled" in edgefl("devices", "list").stdout
    http_plane.enroll("a", "b", site="north")
    http_plane.link.states["a"] = DeviceState(session=1, online=True, agent_version="0", models={"m": 2})
    http_plane.link.measured["a"] = Telemetry(
        cpu_count=4, cpu_percent=12.5, load_1m=0.5, ram_total_mb=8e3, ram_available_mb=6.02e3, disk_free_mb=4e4
    )
    head, first, second = (line.split("\t") for line in edgefl("devices", "list").stdout.splitlines())
    assert head[:8] == ["name", "state", "region", "models", "tags", "cpu", "free memory", "free disk"]
    assert first[5:8] == ["12% of 4", "6.0/8.0 GB", "40.0 GB"]
    assert second[5:8] == ["-", "-", "-"]
    assert first[:5] == ["a", "online", "-", "m:2", "site=north"]
    assert second[:5] == ["b", "offline", "-", "-", "site=north"]
    assert edgefl("devices", "remove", "a").stdout == "a is removed from the fleet\n"
    assert [one["name"] for one in json.loads(edgefl("devices", "list", "--json", "-").stdout)] == ["b"]


def test_a_device_that_is_not_there(edgefl):
    done = edgefl("devices", "remove", "ghost")
    assert (done.exit_code, type(done.exception)) == (1, NotFound)


def test_the_log_of_a_device_is_shown_as_it_is(edgefl, http_plane):
    http_plane.enroll("a")
    http_plane.link.states["a"] = DeviceState(session=1, online=True, agent_version="0", commands=["log"])
    assert edgefl("devices", "logs", "a").stdout == "one\n    two\n"
    assert edgefl("devices", "logs", "a").stdout == "one\n    two\n"  # it waits its turn


def test_names_and_urls_are_whole_on_a_terminal(on_terminal, http_plane):
    name, url = "a-device-with-a-long-name.in-the-hall", "https://192.168.100.100:8000"
    http_plane.enroll(name, site="north-of-the-river", line="3")
    http_plane.link.states[name] = DeviceState(
        session=1, online=True, agent_version="0", models={"digits": 12, "sounds": 3}, serving_url=url
    )
    shown = on_terminal("devices", "list")
    assert name in shown
    assert url in shown
    assert all(len(line.rstrip()) <= 80 for line in shown.splitlines()[:-1]), shown
    assert "no room for" in shown
