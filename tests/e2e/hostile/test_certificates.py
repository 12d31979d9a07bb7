"""Certificates of devices: those that were removed, that run out, and clocks that are wrong."""

import shutil
from pathlib import Path

import grpc
import numpy as np
import pytest

from edgefl.errors import CloudUnreachable
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols import fleet_pb2_grpc as rpc
from edgefl.protocols import tls
from edgefl.protocols.mqtt import LinkConfig, MqttLink


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
    with MqttLink(config, on_failure=pytest.fail) as link:
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
    except CloudUnreachable:
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
    fleet.restart_agent("b", **data["b"] | {"seconds": 3})
    fleet.restart_agent("c", **data["c"])
    run = fleet.start_run("numbers", "rounds.clients=3", "rounds.quorum=1", "rounds.deadline_s=60")
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
    if fleet.broker is None:
        assert not broker_lets_in(fleet, "a", former["a"])
    for name, options in data.items():
        fleet.agents[name].stop()
        fleet.restart_agent(name, **options)
    round_is_right(fleet)


CLOCKS = {"30 hours behind": "-30h", "in 1970": "-20780d", "3 months behind": "-90d"}


@pytest.mark.parametrize("clock", CLOCKS)
def test_a_device_whose_clock_is_behind_takes_part(fleet, three, round_is_right, clock):
    faketime = shutil.which("faketime")
    if faketime is None:
        pytest.skip("faketime is not installed; deploy/system-packages.sh installs it")
    data = three(fleet)
    fleet.agents["b"].stop()
    options = [part for key, value in data["b"].items() for part in ("--data", f"{key}={value}")]
    library = next(Path("/usr/lib").rglob("libfaketime.so.1"))
    env = {"LD_PRELOAD": str(library), "FAKETIME": CLOCKS[clock], "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    agent = fleet.start_agent("b", *options, env=env)
    agent.wait_for("mqtt.up", 30)
    round_is_right(fleet)
