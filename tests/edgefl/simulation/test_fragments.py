"""Rounds that exchange a part of the model: by hand, in every engine, with momentum, below regions, and in bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgefl
from edgefl.config import TrainConfig
from edgefl.errors import ConfigError
from edgefl.task import Task, load_task
from edgefl.training.local import initial_parameters, train_locally
from edgefl.trees import Tree, apply, encoded_bytes, spec_of
from edgefl.trees.fragments import changed_part, fragments_of, sent_part

NAMES, ROUNDS, P = ("client-0", "client-1", "client-2"), 5, 2
SETTINGS = {
    "rounds.count": ROUNDS, "population.clients": len(NAMES), "server.fragments": P, "train.lr": 0.05,
    "train.batch_size": 4, "train.keep_optimizer_state": True,
}  # fmt: skip
MOMENTUM = 0.5


def by_hand(task: Task) -> tuple[Tree, int]:
    """Train as devices do, and step as the server does, with a momentum for each fragment; return the bytes, too."""
    model = dict(initial_parameters(task))
    states: dict[str, Tree] = {}
    velocity = {name: np.zeros_like(one) for name, one in model.items()}
    moved_bytes = 0
    for number in range(1, ROUNDS + 1):
        config = TrainConfig(
            round=number, fragments=P, lr=0.05, batch_size=4, keep_optimizer_state=True, epochs=1
        )  # fmt: skip
        received = model if number == 1 else changed_part(model, config)
        results = {
            client: train_locally(
                task, received, config, options={"part": str(part), "parts": str(len(NAMES))}, round=number,
                client=client, state=states.get(client),
            )
            for part, client in enumerate(NAMES)
        }  # fmt: skip
        sent = sent_part(model, config)
        moved_bytes += len(NAMES) * (encoded_bytes(received) + encoded_bytes(sent))
        weight = sum(one.weight for one in results.values())
        for name in sent:
            mean = sum(one.weight * one.tree[name].astype(np.float64) for one in results.values()) / weight
            first = number <= P
            velocity[name] = (-mean if first else MOMENTUM * velocity[name] - mean).astype(np.float32)
            model[name] = apply(model[name], -velocity[name])
        states = {client: one.state for client, one in results.items()}
        assert all(set(one.tree) == set(sent) for one in results.values())
    return model, moved_bytes


@pytest.mark.parametrize("engine", ["loop", "pool"])
def test_it_is_what_devices_and_a_server_do_by_hand(tasks: Callable[[str], Path], engine: str) -> None:
    server = {"server.options": {"momentum": MOMENTUM}}
    result = edgefl.simulate(tasks("adam"), engine=engine, set=SETTINGS | server)
    wanted, moved_bytes = by_hand(load_task(str(tasks("adam"))))
    for name, array in wanted.items():
        np.testing.assert_allclose(result.parameters[name], array, rtol=0, atol=1e-6, err_msg=name)
    assert sum(one.up_bytes + one.down_bytes for one in result.rounds) == moved_bytes


def test_only_the_rounds_fragment_changes(tasks: Callable[[str], Path]) -> None:
    before = initial_parameters(load_task(str(tasks("adam"))))
    for rounds in (1, 2):
        after = edgefl.simulate(tasks("adam"), engine="loop", set=SETTINGS | {"rounds.count": rounds}).parameters
        fragments = fragments_of(spec_of(before), P)
        changed = {name for name in before if not np.array_equal(before[name], after[name])}
        assert changed == set().union(*fragments[:rounds])


def test_a_client_that_missed_a_round_begins_with_the_whole_model(tasks: Callable[[str], Path]) -> None:
    some = SETTINGS | {"rounds.clients": 2}
    result = edgefl.simulate(tasks("adam"), engine="loop", set=some)
    least = 2 * encoded_bytes(initial_parameters(load_task(str(tasks("adam")))))
    assert max(one.down_bytes for one in result.rounds[1:]) > result.rounds[1].up_bytes
    assert result.rounds[0].down_bytes == least


def test_regions_and_a_resumed_simulation_give_the_same(tasks: Callable[[str], Path], tmp_path: Path) -> None:
    whole = edgefl.simulate(tasks("adam"), engine="loop", set=SETTINGS)
    tiered = edgefl.simulate(tasks("adam"), engine="loop", set=SETTINGS | {"tiers.fan_out": [2]})
    edgefl.simulate(tasks("adam"), engine="loop", set=SETTINGS | {"rounds.count": 3}, checkpoint=tmp_path)
    resumed = edgefl.simulate(tasks("adam"), rounds=ROUNDS, resume=tmp_path)
    for name, array in whole.parameters.items():
        np.testing.assert_allclose(tiered.parameters[name], array, rtol=0, atol=1e-6)
        assert np.array_equal(resumed.parameters[name], array)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train.algorithm": "fedsgd", "train.keep_optimizer_state": False}, "needs train.algorithm=fedavg"),
        ({"tiers.region_rounds": 2, "tiers.fan_out": [2]}, "needs tiers.region_rounds=1"),
        ({"rounds.late": "next"}, "the next round takes another fragment"),
        ({"server.fragments": 1000}, "the model has"),
    ],
)
def test_what_excludes_it_is_named(tasks: Callable[[str], Path], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        edgefl.simulate(tasks("adam"), engine="loop", set=SETTINGS | changes)
