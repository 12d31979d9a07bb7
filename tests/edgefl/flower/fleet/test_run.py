"""Whole Flower apps over a real HTTPS plane: what simulation gives them, a fleet gives them too."""

from __future__ import annotations

import hashlib
import os
import signal
import threading

import numpy as np
import pytest
from flwr.supercore.task_identity import TaskIdentity

from edgefl.errors import ConfigError, JobCancelled, QuorumNotMet, TaskError
from edgefl.flower import load_flower_app, run_flower_app
from edgefl.trees import SpooledTree

LEGACY_SERVER = """
    import flwr as fl
    from flwr.server import ServerAppComponents, ServerConfig
    from flwr.server.strategy import FedAvg

    def server_fn(context):
        return ServerAppComponents(strategy=FedAvg(), config=ServerConfig(num_rounds=context.run_config["rounds"]))

    app = fl.server.ServerApp(server_fn=server_fn)
"""
LEGACY_CLIENT = """
    import numpy as np
    import flwr as fl

    class Client(fl.client.NumPyClient):
        def __init__(self, part):
            self.part = part
        def get_parameters(self, config):
            return [np.zeros(2)]
        def fit(self, parameters, config):
            return [parameters[0] + 1 + self.part], 1 + self.part, {}
        def evaluate(self, parameters, config):
            return float(parameters[0][0]), 1, {}

    app = fl.client.ClientApp(client_fn=lambda context: Client(context.node_config["partition-id"]).to_client())
"""
FAILS = """
    from flwr.clientapp import ClientApp
    app = ClientApp()

    @app.train()
    def train(message, context):
        raise ValueError("no data here")
"""


def without_times(rounds):
    return [{key: value for key, value in one.as_json().items() if key != "seconds"} for one in rounds]


def relays(plane):
    return [(row["state"], row["error"]) for row in plane.relays.rows()]


def test_a_fleet_gives_what_simulation_gives(make_app, on_fleet, http_plane, tmp_path):
    heard, started, out = [], [], tmp_path / "model.safetensors"
    folder = make_app()
    result = on_fleet(
        folder, config={"rounds": 3}, on_round=heard.append, on_start=lambda *told: started.append(told), out=out
    )
    simulated = run_flower_app(load_flower_app(folder), 2, {"rounds": 3})
    assert without_times(result.rounds) == without_times(simulated.rounds) == without_times(heard)
    assert result.final == simulated.final
    np.testing.assert_array_equal(result.arrays.to_numpy_ndarrays()[0], simulated.arrays.to_numpy_ndarrays()[0])
    assert [online for _, online in started] == [2]
    told = result.as_json()
    assert told.keys() == simulated.as_json().keys() | {"job"}
    assert (told["engine"], told["job"], told["clients_by_rounds"]) == ("fleet", started[0][0], {"3": 2})
    assert told["model"] == {"sha256": hashlib.sha256(out.read_bytes()).hexdigest(), "path": str(out)}
    np.testing.assert_allclose(SpooledTree(out)["0"], [5, 5])
    assert relays(http_plane) == [("done", None)]
    assert list((http_plane.folder / "relays").iterdir()) == []
    assert TaskIdentity._task_id is None


def test_a_legacy_app_runs_as_it_is(make_app, on_fleet):
    result = on_fleet(make_app(LEGACY_SERVER, LEGACY_CLIENT))
    assert [one.admitted for one in result.rounds] == [2, 2]
    assert result.final["loss"] == pytest.approx(10 / 3)


def test_where_every_client_fails_the_run_does(make_app, on_fleet, http_plane):
    with pytest.raises(QuorumNotMet, match="ValueError: no data here"):
        on_fleet(make_app(client=FAILS))
    [(state, error)] = relays(http_plane)
    assert (state, "every client failed" in error) == ("failed", True)


def test_what_the_server_app_raises_ends_the_relay(make_app, on_fleet, http_plane):
    server = """
        from flwr.serverapp import ServerApp
        app = ServerApp()

        @app.main()
        def main(grid, context):
            raise RuntimeError("not today")
    """
    with pytest.raises(TaskError, match="its ServerApp raised RuntimeError: not today"):
        on_fleet(make_app(server))
    assert relays(http_plane)[0][0] == "failed"


def test_a_key_that_the_app_has_not_is_refused_before_anything_starts(make_app, on_fleet, http_plane):
    with pytest.raises(ConfigError, match=r"has no run-config key 'round'; known: nested\.rate, rounds"):
        on_fleet(make_app(), config={"round": 3})
    assert relays(http_plane) == []


@pytest.mark.parametrize("legacy", [False, True])
def test_an_operator_who_cancels_from_elsewhere_ends_the_run(make_app, on_fleet, http_plane, legacy):
    folder = make_app(LEGACY_SERVER, LEGACY_CLIENT) if legacy else make_app()
    threads = threading.active_count()

    def cancel(_device, plan):
        http_plane.relays.end(plan.job, "cancelled", "cancelled by its operator")

    with pytest.raises(JobCancelled, match="cancelled by its operator"):
        on_fleet(folder, gate=cancel)
    assert threading.active_count() <= threads + 2  # the played devices'


@pytest.mark.parametrize("legacy", [False, True])
def test_ctrl_c_ends_the_run_with_what_there_is(make_app, on_fleet, http_plane, legacy):
    folder = make_app(LEGACY_SERVER, LEGACY_CLIENT) if legacy else make_app()
    rounds = []

    def interrupt(device, _plan):
        if rounds and device == "cam-0":
            os.kill(os.getpid(), signal.SIGINT)
        return not rounds

    result = on_fleet(folder, config={"rounds": 5}, gate=interrupt, on_round=rounds.append)
    assert result.interrupted
    assert result.rounds[0].admitted == 2
    assert relays(http_plane) == [("cancelled", "interrupted by the operator")]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
