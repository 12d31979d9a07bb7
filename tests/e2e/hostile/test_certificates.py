"""Certificates of devices: those that were removed, that run out, and clocks that are wrong."""

import shutil

import grpc

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
    with MqttLink(config) as link:
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
