"""Certificates of devices: those that were removed, that run out, and clocks that are wrong."""

import shutil
import time
from pathlib import Path

import grpc
import numpy as np
import pytest

from edgefl.errors import ProcessFailed
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols import fleet_pb2_grpc as rpc
from edgefl.protocols import tls
from edgefl.protocols.mqtt import LinkConfig
from tests.threaded import Link


def code_of_next(fleet, identity):
    """What the data plane says to a device with this certificate; None where it lets it in."""
    with grpc.secure_channel(f"127.0.0.1:{fleet.grpc_port}", tls.grpc_channel_credentials(identity)) as channel:
        try:
            rpc.FleetStub(channel).Next(pb.NextRequest(agent_version="0"), timeout=10)
        except grpc.RpcError as error:
            return error.code()
    return None


def broker_lets_in(fleet, name, identity):
    config = LinkConfig(url=f"mqtts://127.0.0.1:{fleet.mqtt_port}", client_id=name, identity=identity)
    with Link(config, on_failure=pytest.fail) as link:
        return link.wait_connected(3)


def copy_of(home, folder):
    """An attacker's copy of a device's key and certificate."""
    folder.mkdir()
    for name in ("key.pem", "cert.pem", "ca.pem"):
        shutil.copy(home / name, folder / name)
    return tls.Identity.in_folder(folder)


def said(agent, text, after):
    try:
        return bool(agent.wait_for(text, 0.1, after=after))
    except ProcessFailed:
        return False


def remove(fleet, name):
    fleet.command("devices", "remove", name)


def test_a_removed_device_is_out_at_every_door_also_after_its_name_is_enrolled_anew(
    fleet, three, round_is_right, tmp_path
):
    data = three(fleet)
    stolen = copy_of(fleet.folder / "c", tmp_path / "stolen")
    assert code_of_next(fleet, stolen) is None
    agent = fleet.agents["c"]
    seen = agent.num_lines()
    remove(fleet, "c")
    agent.wait_for("mqtt.down", 10, after=seen)  # its open connection is cut
    assert code_of_next(fleet, stolen) is grpc.StatusCode.PERMISSION_DENIED
    assert not broker_lets_in(fleet, "c", stolen)
    agent.stop()
    shutil.rmtree(fleet.folder / "c")
    agent = fleet.add_agent("c", **data["c"])
    seen = agent.num_lines()
    assert code_of_next(fleet, stolen) is grpc.StatusCode.PERMISSION_DENIED
    assert not broker_lets_in(fleet, "c", stolen)
    assert not said(agent, "mqtt.down", seen)
    round_is_right(fleet)


def test_what_a_removed_device_sends_or_has_sent_is_not_folded(fleet, three, round_is_right):
    data = three(fleet)
    for name in ("b", "c"):
        fleet.agents[name].stop()
    fleet.restart_agent("b", **data["b"] | {"seconds": 300})
    fleet.restart_agent("c", **data["c"])
    run = fleet.start_run("numbers", "rounds.clients=3", "rounds.quorum=1", "rounds.deadline_s=600")
    fleet.agents["c"].wait_for("update.stored", 30)  # b still trains
    remove(fleet, "b")
    result, model = fleet.finish_run(run)
    (entry,) = result["rounds"]
    assert entry["failed"] == 1
    np.testing.assert_allclose(model["w"], np.full(3, (1 * 1.0 + 5 * 10.0) / 6), rtol=1e-6)
    fleet.agents["b"].stop()
    shutil.rmtree(fleet.folder / "b")
    fleet.add_agent("b", **data["b"])
    round_is_right(fleet)


def restart_cloud(fleet, *options):
    fleet.cloud.stop()
    fleet.start_cloud(*options)


def serial_in(home):
    return tls.serial_number((home / "cert.pem").read_bytes())


def test_devices_renew_their_certificates_and_the_former_ones_are_worth_nothing(fleet, three, round_is_right, tmp_path):
    restart_cloud(fleet, "--certificate-days", "10")
    data = three(fleet)
    former = {name: copy_of(fleet.folder / name, tmp_path / f"former-{name}") for name in "abc"}
    seen = {name: agent.num_lines() for name, agent in fleet.agents.items()}
    restart_cloud(fleet)  # by its usual lifetime, ten days are much too few
    for name, agent in fleet.agents.items():
        agent.wait_for("certificate.renewed", 60, after=seen[name])
        agent.wait_for("mqtt.up", 60, after=seen[name])
        home = fleet.folder / name
        assert tls.serial_number(former[name].cert.read_bytes()) != serial_in(home)
        assert (home / "key.pem").read_bytes() != former[name].key.read_bytes()
    round_is_right(fleet)
    for identity in former.values():
        assert code_of_next(fleet, identity) is grpc.StatusCode.PERMISSION_DENIED
    if fleet.is_builtin:
        assert not broker_lets_in(fleet, "a", former["a"])
    for name, options in data.items():
        fleet.agents[name].stop()
        fleet.restart_agent(name, **options)
    round_is_right(fleet)


@pytest.mark.timeout(600)
def test_a_fleet_outlives_the_certificates_that_it_began_with(fleet, three, round_is_right):
    fleet.cloud.stop()
    (fleet.home / "tls" / "cert.pem").unlink()
    fleet.start_cloud("--certificate-days", "0.0014")  # two minutes
    data = three(fleet)
    homes = [fleet.home / "tls", *(fleet.folder / name for name in "abc")]
    first = {home: tls.expires((home / "cert.pem").read_bytes()).timestamp() for home in homes}
    assert max(first.values()) < time.time() + 150
    for name in "abc":
        fleet.agents[name].wait_for("certificate.renewed", 120)
    while time.time() <= max(first.values()):
        round_is_right(fleet)
    for home, end_s in first.items():
        assert tls.expires((home / "cert.pem").read_bytes()).timestamp() > end_s
    fleet.agents["a"].stop()
    fleet.restart_agent("a", **data["a"])
    round_is_right(fleet)


CLOCKS = {"30 hours behind": "-30h", "in 1970": "1970"}


def wrong_clock(clock):
    """The environment of a process whose clock is wrong by so much."""
    library = next(Path("/usr/lib").rglob("libfaketime.so.1"), None)
    if library is None:
        pytest.skip("faketime is not installed; deploy/system-packages.sh installs it")
    shift = f"-{int(time.time() / 86400) - 2}d" if clock == "1970" else clock
    return {
        "LD_PRELOAD": str(library), "FAKETIME": shift, "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "PYTHONPATH": str(Path(__file__).with_name("wrong_clock")),
    }  # fmt: skip


@pytest.mark.parametrize("clock", CLOCKS)
def test_a_device_whose_clock_is_behind_enrols_renews_and_takes_part(fleet, three, round_is_right, clock):
    env = wrong_clock(CLOCKS[clock])
    data = three(fleet)
    fleet.agents["b"].stop()
    remove(fleet, "b")
    shutil.rmtree(fleet.folder / "b")
    enrolling = fleet.spawn(
        "enrol.log", "agent", "enroll", "--home", fleet.folder / "b", "--cloud", fleet.url, "--token", fleet.token(),
        "--name", "b", env=env,
    )  # fmt: skip
    assert enrolling.popen.wait(60) == 0, enrolling.log.read_text()
    enrolling.stop()
    options = [part for key, value in data["b"].items() for part in ("--data", f"{key}={value}")]
    fleet.start_agent("b", *options, env=env).wait_for("mqtt.up", 30)
    round_is_right(fleet)
    before = serial_in(fleet.folder / "b")
    restart_cloud(fleet, "--certificate-days", "3000")
    fleet.agents["b"].wait_for("certificate.renewed", 60)
    fleet.agents["b"].wait_for("mqtt.up", 60, after=fleet.agents["b"].wait_for("certificate.renewed"))
    assert serial_in(fleet.folder / "b") != before
    round_is_right(fleet)


@pytest.mark.parametrize("clock", ["+800d", "-90d", "1970"])
def test_a_cloud_whose_clock_was_wrong_serves_its_fleet_when_it_is_right_again(fleet, three, round_is_right, clock):
    env = wrong_clock(clock)
    three(fleet)
    fleet.cloud.stop()
    fleet.start_cloud(env=env)
    if clock != "+800d":  # all certificates have ended by it
        round_is_right(fleet)
    seen = {name: agent.num_lines() for name, agent in fleet.agents.items()}
    restart_cloud(fleet)
    if fleet.is_builtin:
        for name, agent in fleet.agents.items():
            agent.wait_for("mqtt.up", 30, after=seen[name])
    round_is_right(fleet)
