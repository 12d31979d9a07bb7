"""Light devices are in the fleet as others are: enrolled, online, heard at both doors, and counted in rounds."""

from benchmarks.light_devices import LightDevices, connected, enrol, online
from edgefl.local_fleet import LocalFleet


def test_a_few_devices_are_online_while_they_are_held(tmp_path):
    with LocalFleet(tmp_path) as fleet:
        fleet.start()
        homes = enrol(fleet, [f"light-{number}" for number in range(5)])
        with LightDevices(fleet, homes) as devices:
            told = devices.told(60)
            assert online(fleet)[0] == 5
    assert {(one.device, one.door) for one in told} == {
        (home.name, door) for home in homes for door in ("mqtt", "grpc")
    }
    assert {one.refusal for one in told} == {""}


def test_each_device_is_counted_in_each_round(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.light_devices.IDLE_S", 0.1)
    with LocalFleet(tmp_path) as fleet:
        fleet.start()
        seen = connected(fleet, 3)
    assert (seen.num_online, seen.refused) == (3, [])
    assert seen.rounds.admitted == [3] * 5
