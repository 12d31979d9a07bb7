"""What simulated clients keep: as on a device, in every engine, and after an interruption."""

import dataclasses

import numpy as np
import pytest

import edgefl
from edgefl.config import JobConfig, RoundsConfig, TrainConfig
from edgefl.errors import ConfigError
from edgefl.rounds import select_clients
from edgefl.simulation.engines.auto import make_engine
from edgefl.simulation.engines.client_states import FOLDER, ClientStates, open_states
from edgefl.simulation.engines.stackable import why_not_stacked
from edgefl.task import load_task
from edgefl.training.local import initial_parameters, train_locally
from edgefl.trees import apply

KEEPS = TrainConfig(keep_optimizer_state=True)
SETTINGS = {
    "rounds.count": 4, "rounds.clients": 2, "population.clients": 3, "train.keep_optimizer_state": True,
    "train.lr": 0.05, "train.batch_size": 4,
}  # fmt: skip


def state(number):
    return {"optimizer/0/step": np.array(number, np.float32)}


def kept(states, client, before):
    found = states.before(client, before)
    return None if found is None else float(found["optimizer/0/step"])


def test_a_client_gets_the_state_of_its_last_round_before_this_one(tmp_path):
    states = ClientStates(tmp_path)
    for number in (1, 4, 7):
        states.keep("a", number, state(number))
    states.keep("../b", 7, state(7))
    assert [kept(states, "a", before) for before in (1, 2, 4, 5, 8)] == [None, 1, 1, 4, 7]
    states.settle(6)
    assert [kept(states, "a", before) for before in (4, 5, 7, 8)] == [None, 4, 4, 7]
    assert (kept(states, "../b", 7), kept(states, "../b", 8), kept(states, "c", 8)) == (None, 7, None)


def test_the_folder_is_beside_a_checkpoint_else_temporary(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    with open_states(TrainConfig(), one, None) as states:
        assert states is None
    with open_states(KEEPS, one, None) as states:
        states.keep("a", 1, state(1))
    with open_states(KEEPS, other, one) as states:
        assert (states.folder, kept(states, "a", 2)) == (other / FOLDER, 1)
    with open_states(KEEPS, None, one) as states:
        assert states.folder == one / FOLDER


def test_a_lost_process_leaves_its_states_to_the_next(tmp_path):
    lost = open_states(KEEPS, None, None)
    states = lost.__enter__()
    states.keep("a", 3, state(3))
    with open_states(KEEPS, None, None, str(states.folder)) as again:
        assert kept(again, "a", 4) == 3
        assert not states.folder.exists()
    assert not again.folder.exists()
    with open_states(KEEPS, None, None, str(states.folder)) as empty:
        assert kept(empty, "a", 4) is None


def by_hand(reference, names):
    """Train the same on devices, one round after another."""
    task = load_task(str(reference))
    tree, states = initial_parameters(task), {}
    for number in range(1, 5):
        config = dataclasses.replace(KEEPS, lr=0.05, batch_size=4, round=number)
        cohort = select_clients(names, JobConfig(rounds=RoundsConfig(clients=2)), number)
        results = {}
        for client in cohort:
            results[client] = train_locally(
                task, tree, config, options={"part": str(names.index(client)), "parts": "3"}, round=number,
                client=client, state=states.get(client),
            )  # fmt: skip
            states[client] = results[client].state
        weight = sum(one.weight for one in results.values())
        tree = {
            name: apply(old, sum(one.weight * one.tree[name] for one in results.values()) / weight)
            for name, old in tree.items()
        }
    return tree


@pytest.mark.parametrize("engine", ["loop", "pool"])
def test_simulated_clients_keep_what_devices_keep(tasks, engine):
    names = ["client-0", "client-1", "client-2"]
    result = edgefl.simulate(tasks("adam"), engine=engine, set=SETTINGS)
    wanted = by_hand(tasks("adam"), names)
    anew = edgefl.simulate(tasks("adam"), engine="loop", set=SETTINGS | {"train.keep_optimizer_state": False})
    for name, array in wanted.items():
        np.testing.assert_allclose(result.parameters[name], array, rtol=0, atol=1e-6)
    assert any(np.abs(anew.parameters[name] - array).max() > 1e-3 for name, array in wanted.items())


@pytest.mark.parametrize("every", [1, 2])
def test_a_simulation_that_is_resumed_gives_the_same(tasks, tmp_path, every):
    whole = edgefl.simulate(tasks("adam"), engine="loop", set=SETTINGS)
    three = SETTINGS | {"rounds.count": 3}
    edgefl.simulate(tasks("adam"), engine="loop", set=three, checkpoint=tmp_path, checkpoint_every=every)
    result = edgefl.simulate(tasks("adam"), rounds=4, resume=tmp_path)
    for name, array in whole.parameters.items():
        assert np.array_equal(result.parameters[name], array)


def test_engines_without_a_place_for_states_say_so(set_up, tmp_path):
    setup = dataclasses.replace(set_up("task"), states=ClientStates(tmp_path))
    assert why_not_stacked(setup) == "its clients keep a state between rounds"
    with pytest.raises(ConfigError, match="the engine 'ray' has no place where clients keep their state"):
        make_engine("ray", setup)
    with pytest.raises(ConfigError, match="has no optimizer of its own"):
        edgefl.simulate(setup.task, clients=2, set={"train.keep_optimizer_state": True})
