"""Without TLS, on the loopback: the same loop, with devices told by name."""

import numpy as np

from edgefl.operator.client import CloudClient, load_credentials


def test_a_round_without_tls(insecure_fleet, tmp_path):
    for name, delta in (("a", 1), ("b", 3)):
        insecure_fleet.add_agent(name, delta=delta, weight=1, calls=tmp_path / f"{name}.calls")
    result, model = insecure_fleet.run_task("numbers", "rounds.clients=2", "rounds.quorum=2")
    np.testing.assert_allclose(model["w"], np.full(3, 2.0))
    assert result["rounds"][0]["admitted"] == 2
    with CloudClient(None, load_credentials(insecure_fleet.credentials)) as client:
        assert {one["name"]: one["online"] for one in client.devices()} == {"a": True, "b": True}
