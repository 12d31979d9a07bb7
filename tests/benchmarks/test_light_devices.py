"""Light devices are in the fleet as others are: enrolled, online, and heard at both doors."""

from benchmarks.light_devices import LightDevices, _packet, enrol, online
from edgefl.local_fleet import LocalFleet


def test_a_few_devices_are_online_while_they_are_held(tmp_path):
    with LocalFleet(tmp_path) as fleet:
        fleet.start()
        homes = enrol(fleet, [f"light-{number}" for number in range(5)])
        with LightDevices(fleet, homes, workers=1) as devices:
            told = devices.told(60)
            assert online(fleet)[0] == 5
    assert {(one.device, one.door) for one in told} == {
        (home.name, door) for home in homes for door in ("mqtt", "grpc")
    }
    assert {one.refusal for one in told} == {""}


def test_packets_by_hand():
    assert _packet(0x10, b"x" * 5) == b"\x10\x05xxxxx"
    assert _packet(0x31, b"x" * 300)[:3] == b"\x31\xac\x02"
