"""The tabular examples: their R2 on rows that no device has, and trees that are XGBoost's own, tree by tree."""

import json
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import edgefl
from edgefl.errors import JobFailed
from edgefl.models.export import export_task
from edgefl.task import load_task

FOLDER = Path(__file__).parents[2] / "examples" / "tabular"
XGBOOST = pytest.mark.skipif(find_spec("xgboost") is None, reason="needs XGBoost: pip install '.[examples]'")


@pytest.fixture(autouse=True)
def path(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def trees():
    load_task(str(FOLDER / "trees"))
    return import_module("task")


def simulated(folder, clients, rounds):
    config = {"rounds.count": rounds, "rounds.quorum": 1}
    return edgefl.simulate(folder, clients=clients, config=folder / "config.toml", set=config, engine="loop")


def test_the_network():
    result = simulated(FOLDER, 3, 10)
    assert 0.45 < result.final["r2"] < 0.55


def test_no_row_is_in_two_places():
    task = load_task(str(FOLDER))
    rows = [task.test_data(), *(task.train_data(str(part), "7") for part in range(7))]
    seen = [row.tobytes() for inputs, _ in rows for row in inputs]
    assert len(seen) == len(set(seen)) == 442


@XGBOOST
def test_the_trees_of_one_device_are_those_of_xgboost_alone(trees):
    xgb, (inputs, targets) = trees.xgb, trees.load_part()
    settings = {"max_depth": trees.DEPTH, "min_child_weight": 5, "eta": 0.2, "base_score": trees.BASE, "nthread": 1}
    alone = xgb.train(settings, xgb.DMatrix(inputs, targets), 12)
    ours = trees.booster_of(simulated(FOLDER / "trees", 1, 12).parameters)
    held_out = xgb.DMatrix(trees.load_held_out()[0])
    np.testing.assert_array_equal(ours.predict(held_out), alone.predict(held_out))


@XGBOOST
def test_a_round_of_several_devices_adds_the_mean_of_their_trees(trees):
    """By hand: each device's first tree, weighted by its rows."""
    xgb, held_out = trees.xgb, trees.xgb.DMatrix(trees.load_held_out()[0])
    settings = {"max_depth": trees.DEPTH, "min_child_weight": 5, "eta": 0.2, "base_score": trees.BASE, "nthread": 1}
    parts = [trees.load_part(str(part), "3") for part in range(3)]
    alone = [xgb.train(settings, xgb.DMatrix(*part), 1).predict(held_out) for part in parts]
    wanted = np.average(alone, axis=0, weights=[len(targets) for _, targets in parts])
    ours = trees.booster_of(simulated(FOLDER / "trees", 3, 1).parameters)
    np.testing.assert_allclose(ours.predict(held_out), wanted, rtol=1e-6)
    sent = json.loads(ours.save_raw("json"))["learner"]["gradient_booster"]["model"]["trees"]
    assert len(sent) == 3


@XGBOOST
def test_the_trees_learn_and_their_export_predicts_the_same(trees, tmp_path):
    result = simulated(FOLDER / "trees", 5, 30)
    assert 0.45 < result.final["r2"] < 0.55
    assert len(export_task(trees.task, result.parameters, tmp_path / "trees.onnx")) == 2  # raises if it differs


@XGBOOST
def test_deeper_trees_are_kept_whole(trees, monkeypatch):
    monkeypatch.setattr(trees, "DEPTH", 3)
    monkeypatch.setattr(trees, "NODES", 15)
    parameters = trees.initial()
    change = trees.fit(parameters, edgefl.TrainConfig(lr=0.3), {"part": "1", "parts": "2"}).tree
    xgb, (inputs, targets) = trees.xgb, trees.load_part("1", "2")
    settings = {"max_depth": 3, "min_child_weight": 5, "eta": 0.3, "base_score": trees.BASE, "nthread": 1}
    alone = xgb.train(settings, xgb.DMatrix(inputs, targets), 1).predict(xgb.DMatrix(inputs))
    share = 0.3  # of the rows, as if this device had so many of all
    ours = trees.booster_of({name: share * array for name, array in change.items()}).predict(xgb.DMatrix(inputs))
    np.testing.assert_allclose(ours - trees.BASE, share * (alone - trees.BASE), rtol=1e-5, atol=1e-4)


@XGBOOST
def test_more_devices_or_rounds_than_there_is_place_for(trees):
    with pytest.raises(JobFailed, match="part=0 of parts=11: expected part < parts <= 10"):
        simulated(FOLDER / "trees", 11, 1)
    full = {**trees.initial(), "share": np.ones((trees.ROUNDS, trees.PARTS))}
    with pytest.raises(ValueError, match="place for the trees of 60 rounds, and they are used"):
        trees.fit(full, edgefl.TrainConfig(), {})
