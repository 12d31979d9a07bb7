"""A region as a process: it starts below a real cloud, says how it is, stops cleanly, also without its parent."""

from __future__ import annotations

import json
import signal
import ssl
import time

import httpx
import psutil
import pytest

from cloud.broker.child import find_mosquitto
from cloud.region.server.work import round_in
from edgefl.errors import ProtocolError
from edgefl.local_fleet import LocalFleet
from edgefl.protocols import tls


@pytest.mark.parametrize("key", ["work/job", "work/job/x", "work//1", "work/job/1/2", "work/job/-1", "work/job/"])
def test_a_key_that_names_no_round(key):
    with pytest.raises(ProtocolError, match="no work of a round"):
        round_in(key)


def test_a_key_of_a_round():
    assert round_in("work/job-1/12") == ("job-1", 12)


def health(fleet, name):
    context = tls.client_context(fleet.home / "tls" / "ca.pem", None, name + tls.REGION_DOMAIN)
    with httpx.Client(verify=context, trust_env=False) as client:
        return client.get(f"{fleet.url_of(name)}/v1/health").json()


def test_a_region_starts_says_how_it_is_and_stops(tmp_path):
    with LocalFleet(tmp_path, broker="builtin") as fleet:
        fleet.start()
        fleet.start_region("north")
        end_s = time.monotonic() + 30
        while (said := health(fleet, "north"))["status"] != "ok":  # its own link to its broker may come a moment later
            assert time.monotonic() < end_s, said["parts"]
            time.sleep(0.2)
        assert said["region"] == "north"
        assert {"link", "uplink", "disk", "database"} <= said["parts"].keys()
        seen = fleet.regions["north"].num_lines()
        fleet.cloud.signal(signal.SIGKILL)
        fleet.regions["north"].wait_for("uplink.down", after=seen)
        end_s = time.monotonic() + 30
        while (said := health(fleet, "north"))["status"] == "ok":  # it looks at its parts every few seconds
            assert time.monotonic() < end_s
            time.sleep(0.2)
        assert [name for name, part in said["parts"].items() if not part["ok"]] == ["uplink"]
        assert fleet.regions["north"].stop() == 0  # also without its parent
        again = fleet.spawn("north-2.log", "region", "start", "--home", tmp_path / "north",
                            *(f"--{kind}-port={port}" for kind, port in zip(("grpc", "http", "mqtt"),
                                                                            fleet.region_ports["north"],
                                                                            strict=True)))  # fmt: skip
        fleet.regions["north-2"] = again
        again.wait_for("region.ready")
        assert json.loads((tmp_path / "north" / "fleet.json").read_text())["running"] == []
        fleet.cloud.stop()
        fleet.start_cloud()
        again.wait_for("uplink.up")
        with pytest.raises(httpx.ConnectError):  # its certificate is no cloud's, wherever it is
            httpx.get(fleet.url_of("north") + "/v1/health",
                      verify=ssl.create_default_context(cafile=fleet.home / "tls" / "ca.pem"))  # fmt: skip


def test_a_region_that_is_removed_stops_with_the_reason(tmp_path):
    with LocalFleet(tmp_path, broker="builtin") as fleet:
        fleet.start()
        fleet.start_region("north")
        north = fleet.regions["north"]
        assert json.loads(fleet.command("devices", "remove", "north", "--json", "-"))["reassigned"] == []
        north.wait_for("so that its devices find other parents: region 'north' is not enrolled")
        fleet.cloud.wait_for("region.disconnected region=north")


@pytest.mark.skipif(find_mosquitto() is None, reason="mosquitto is not installed; run deploy/system-packages.sh")
def test_mosquitto_is_a_regions_broker_survives_a_kill_and_ends_with_the_region(tmp_path):
    with LocalFleet(tmp_path, broker="embedded") as fleet:
        fleet.start()
        fleet.start_region("north")
        north = fleet.regions["north"]
        north.wait_for("broker=mosquitto")
        fleet.enroll("a", region="north")
        agent = fleet.start_agent("a")
        seen = agent.wait_for("mqtt.up")
        [mosquitto] = [one for one in psutil.Process(north.pid).children() if one.name() == "mosquitto"]
        mosquitto.kill()
        agent.wait_for("mqtt.up", after=seen)
        assert "broker" in health(fleet, "north")["parts"]
        [again] = [one for one in psutil.Process(north.pid).children() if one.name() == "mosquitto"]
        north.kill()
        psutil.wait_procs([again], timeout=30)
        assert not again.is_running()
