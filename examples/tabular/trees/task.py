"""The same table as in `examples/tabular`, learned by gradient-boosted trees of XGBoost: federated bagging.

In a round each device gets the trees so far, lets XGBoost fit one more to its own rows, and sends only this tree. The
next model has the trees of all devices, each with the device's share of the rows: a round adds their weighted mean.

A model in edgefl is a set of arrays whose changes are averaged, so the trees are kept in places: the tree of part p in
round r is row [r, p] of each array, and every other device sends zeros there. What is averaged is share * tree, where
share = rows of the device / rows of all, and the array `share` holds the share itself: dividing by it gives the tree
back. In float64 nothing is lost: after rounding to XGBoost's float32 each threshold is the one that was sent.
"""

import json
from collections.abc import Mapping
from functools import cache

import numpy as np
import xgboost as xgb
from sklearn.datasets import load_diabetes
from sklearn.metrics import mean_squared_error, r2_score

from edgefl import FitResult, Task, TrainConfig

HELD_OUT, CUT_SEED = 110, 0
ROUNDS, PARTS = 60, 10  # there is place for so many trees
DEPTH = 1  # of splits: one, for so few rows
NODES = 2 ** (DEPTH + 1) - 1  # the children of node i are 2i + 1 and 2i + 2
NUM_COLUMNS, BASE = 10, 150.0  # what the model predicts without trees: about the mean of the targets
LEAF, NO_PARENT = -1, 2**31 - 1  # as XGBoost writes them
Arrays = Mapping[str, np.ndarray]


@cache
def _table() -> tuple[np.ndarray, np.ndarray]:
    """Return inputs (442, 10) and targets (442,), in a fixed random order."""
    inputs, targets = load_diabetes(return_X_y=True)
    order = np.random.default_rng(CUT_SEED).permutation(len(targets))
    return inputs[order].astype(np.float32), targets[order].astype(np.float32)


def load_part(part: str = "0", parts: str = "1") -> tuple[np.ndarray, np.ndarray]:
    """Return this device's own rows."""
    if not 0 <= int(part) < int(parts) <= PARTS:
        message = f"part={part} of parts={parts}: expected part < parts <= {PARTS}"
        raise ValueError(message)
    inputs, targets = _table()
    own = np.array_split(np.arange(HELD_OUT, len(targets)), int(parts))[int(part)]
    return inputs[own], targets[own]


def load_held_out() -> tuple[np.ndarray, np.ndarray]:
    """Return the quarter on which no device trains."""
    inputs, targets = _table()
    return inputs[:HELD_OUT], targets[:HELD_OUT]


def initial() -> Arrays:
    """Return a model without trees."""
    nodes = {name: np.zeros((ROUNDS, PARTS, NODES)) for name in ("column", "threshold", "value")}
    return {**nodes, "share": np.zeros((ROUNDS, PARTS))}


def booster_of(parameters: Arrays) -> xgb.Booster:
    """Return XGBoost's model with all trees so far."""
    one_row = xgb.DMatrix(np.zeros((1, NUM_COLUMNS), np.float32), np.zeros(1, np.float32))
    empty = xgb.train({"base_score": BASE, "objective": "reg:squarederror", "nthread": 1}, one_row, 0)
    model = json.loads(empty.save_raw("json"))
    trees = model["learner"]["gradient_booster"]["model"]
    for place in zip(*np.nonzero(parameters["share"]), strict=True):
        trees["trees"].append(_tree_at(parameters, place, number=len(trees["trees"])))
    count = len(trees["trees"])
    trees["tree_info"], trees["iteration_indptr"] = [0] * count, list(range(count + 1))
    trees["gbtree_model_param"]["num_trees"] = str(count)
    booster = xgb.Booster({"nthread": 1})
    booster.load_model(bytearray(json.dumps(model).encode()))
    return booster


def _tree_at(parameters: Arrays, place: tuple[int, int], number: int) -> dict:
    """Return the tree of one place as XGBoost writes it, with its leaves times its share."""
    share = parameters["share"][place]
    columns = np.rint(parameters["column"][place] / share).astype(int) - 1  # LEAF where there is no split
    thresholds, values = parameters["threshold"][place] / share, parameters["value"][place]  # the share stays in
    order = [0]  # the nodes that there are, parents first; all others are zeros
    for node in order:
        if columns[node] != LEAF:
            order += [2 * node + 1, 2 * node + 2]
    at = {node: index for index, node in enumerate(order)}
    splits = [columns[node] != LEAF for node in order]
    return {
        "base_weights": [0.0] * len(order),
        "categories": [], "categories_nodes": [], "categories_segments": [], "categories_sizes": [],
        "default_left": [0] * len(order),
        "id": number,
        "left_children": [at[2 * node + 1] if split else LEAF for node, split in zip(order, splits, strict=True)],
        "right_children": [at[2 * node + 2] if split else LEAF for node, split in zip(order, splits, strict=True)],
        "loss_changes": [0.0] * len(order),
        "parents": [at[(node - 1) // 2] if node else NO_PARENT for node in order],
        "split_conditions": [
            float(thresholds[node] if split else values[node]) for node, split in zip(order, splits, strict=True)
        ],
        "split_indices": [int(max(columns[node], 0)) for node in order],
        "split_type": [0] * len(order),
        "sum_hessian": [1.0] * len(order),
        "tree_param": {
            "num_deleted": "0", "num_feature": str(NUM_COLUMNS), "num_nodes": str(len(order)), "size_leaf_vector": "1",
        },
    }  # fmt: skip


def _nodes_of(tree: Mapping[str, list]) -> dict[str, np.ndarray]:
    """Return a tree that XGBoost wrote as arrays (NODES,)."""
    nodes = {name: np.zeros(NODES) for name in ("column", "threshold", "value")}
    waiting = [(0, 0)]  # its number there, and here
    for theirs, ours in waiting:
        if (left := tree["left_children"][theirs]) == LEAF:
            nodes["value"][ours] = tree["split_conditions"][theirs]
            continue
        nodes["column"][ours] = tree["split_indices"][theirs] + 1
        nodes["threshold"][ours] = tree["split_conditions"][theirs]
        waiting += [(left, 2 * ours + 1), (tree["right_children"][theirs], 2 * ours + 2)]
    return nodes


def fit(parameters: Arrays, config: TrainConfig, options: Mapping[str, str]) -> FitResult:
    """Let XGBoost add one tree for this device's rows, with `train.lr` as its eta."""
    inputs, targets = load_part(**options)
    part = int(options.get("part", "0"))
    this_round = int(np.count_nonzero(parameters["share"].any(axis=1)))
    if this_round == ROUNDS:
        message = f"the model has place for the trees of {ROUNDS} rounds, and they are used"
        raise ValueError(message)
    booster = booster_of(parameters)
    booster.set_param({"max_depth": DEPTH, "min_child_weight": 5, "eta": config.lr})
    rows = xgb.DMatrix(inputs, targets)
    booster.update(rows, booster.num_boosted_rounds())
    tree = json.loads(booster.save_raw("json"))["learner"]["gradient_booster"]["model"]["trees"][-1]
    change = {name: np.zeros_like(array) for name, array in parameters.items()}
    for name, nodes in _nodes_of(tree).items():
        change[name][this_round, part] = nodes
    change["share"][this_round, part] = 1.0
    error = mean_squared_error(targets, booster.predict(rows))
    return FitResult(tree=change, weight=len(targets), metrics={"loss": error})


def evaluate(parameters: Arrays) -> Mapping[str, float]:
    """Return metrics on the held-out rows."""
    inputs, targets = load_held_out()
    predicted = booster_of(parameters).predict(xgb.DMatrix(inputs))
    return {"loss": mean_squared_error(targets, predicted), "r2": r2_score(targets, predicted)}


def export(parameters: Arrays) -> tuple[object, np.ndarray, np.ndarray]:
    """Return the model as ONNX, and rows with what XGBoost predicts for them, with which it is compared."""
    from onnxmltools import convert_xgboost
    from onnxmltools.convert.common.data_types import FloatTensorType

    booster = booster_of(parameters)
    model = convert_xgboost(booster, initial_types=[("input", FloatTensorType([None, NUM_COLUMNS]))])
    inputs, _ = load_held_out()
    return model, inputs, booster.predict(xgb.DMatrix(inputs))


task = Task(name="diabetes-trees", initial=initial, fit=fit, evaluate=evaluate, export=export)
