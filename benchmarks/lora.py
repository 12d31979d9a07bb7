"""Federated LoRA: is the mean of products exact, what does the mean of factors lose, and what travels?

Shapes: the query and value projections of a decoder with 30 layers of width 576 (as SmolLM2-135M), eight devices of
ranks 4 and 8 in two regions, unequal weights. The factors are drawn: exactness and bytes do not depend on training.
Learning: `examples/lora`, adapters against full fine-tuning of the same base on the same samples.

    python -m benchmarks.lora [--quick] [--json F]
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

import edgefl
from benchmarks.report import Row, Target, command
from edgefl.aggregation.mean import WeightedMean
from edgefl.aggregation.server_opt import ServerOptimizer
from edgefl.records import Update
from edgefl.settings.server import ServerConfig
from edgefl.task import load_task
from edgefl.trees import Array, EncodedTree, Tree, encoded_bytes

EXAMPLE = Path(__file__).parents[1] / "examples" / "lora"
LAYERS, QUICK_LAYERS = 30, 2
SHAPES = {"q_proj": (576, 576), "v_proj": (192, 576)}
RANKS = (4, 8) * 4
FULL_BYTES = 4 * 134_515_008  # the whole model in float32
ROUNDS, QUICK_ROUNDS = 10, 2
EXACT = 1e-6


def measure(*, quick: bool) -> Iterator[Row]:
    """Yield the rows of the decoder's shapes, then of the example's learning."""
    yield from _shapes(QUICK_LAYERS if quick else LAYERS)
    yield from _learning(QUICK_ROUNDS if quick else ROUNDS)


def _shapes(layers: int) -> Iterable[Row]:
    workload = f"{layers} layers of width 576, ranks 4 and 8, 8 devices in 2 regions"
    names = {f"layers.{number}.{name}": shape for number in range(layers) for name, shape in SHAPES.items()}
    start = EncodedTree({
        f"{name}@lora_{side}": np.zeros((shape[0], 0) if side == "B" else (0, shape[1]), np.float32)
        for name, shape in names.items() for side in "BA"
    })  # fmt: skip
    updates = [_update(number, rank, names) for number, rank in enumerate(RANKS)]
    regions, top = [updates[:4], updates[4:]], WeightedMean(start)
    sums = []
    for region in regions:
        rule = WeightedMean(start)
        for update in region:
            rule.add(update)
        sums.append(rule.partial_mean())
        top.merge(sums[-1])
    mean = top.result()
    wanted = {name: _centralised(name, updates) for name in names}
    error = max(float(np.abs(mean[f"{name}@lora"] - one).max()) for name, one in wanted.items())
    yield Row(
        workload=workload, metric="largest error of the mean", unit="1", ours=error,
        targets=(Target(of="ours", at_most=EXACT),), rival="mean of the factors, ranks filled with zeros",
        theirs=max(float(np.abs(_of_factors(name, updates) - one).max()) for name, one in wanted.items()),
        detail={"largest element": max(float(np.abs(one).max()) for one in wanted.values())},
    )  # fmt: skip
    full = FULL_BYTES * layers // LAYERS
    up = sum(encoded_bytes(one.tree) for one in updates) / len(updates)
    yield _bytes(workload, "up, per device and round", up, full)
    yield _bytes(workload, "up, per region and round", sum(encoded_bytes(one.total) for one in sums) / len(sums), full)
    parameters: Tree = start
    for number in range(1, ROUNDS + 1):
        if number in {1, 2, ROUNDS}:
            yield _bytes(workload, f"down, per device, before round {number}", encoded_bytes(parameters), full)
        parameters = ServerOptimizer(ServerConfig(), gradient=False).step(parameters, copy.copy(mean))


def _bytes(workload: str, metric: str, ours: float, full: float) -> Row:
    return Row(
        workload=workload, metric=metric, unit="MB", ours=ours / 1e6, rival="full fine-tuning", theirs=full / 1e6,
        targets=(Target(of="ratio", at_least=1.0),),
    )  # fmt: skip


def _update(number: int, rank: int, names: dict[str, tuple[int, int]]) -> Update:
    rng, stored = np.random.default_rng(number), dict[str, Array]()
    for name, (rows, columns) in names.items():
        stored[f"{name}@lora_B"] = rng.normal(scale=0.1, size=(rows, rank)).astype(np.float32)
        stored[f"{name}@lora_A"] = rng.normal(scale=columns**-0.5, size=(rank, columns)).astype(np.float32)
    return Update(job="job", round=1, device=f"d{number}", tree=EncodedTree(stored), weight=1.0 + 3 * number)


def _centralised(name: str, updates: list[Update]) -> Array:
    """Return the weighted mean of the products, in float64."""
    total = sum(one.weight * _factor(one, name, "B") @ _factor(one, name, "A") for one in updates)
    return np.asarray(total / sum(one.weight for one in updates))


def _of_factors(name: str, updates: list[Update]) -> Array:
    """Return the product of the weighted means of B and A, each filled with zeros to the highest rank."""
    weight, most = sum(one.weight for one in updates), max(RANKS)
    means = []
    for side, axis in (("B", 1), ("A", 0)):
        filled = []
        for one in updates:
            factor = _factor(one, name, side)
            more = [(0, 0), (0, 0)]
            more[axis] = (0, most - factor.shape[axis])
            filled.append(one.weight * np.pad(factor, more))
        means.append(sum(filled) / weight)
    return np.asarray(means[0] @ means[1])


def _factor(update: Update, name: str, side: str) -> Array:
    stored = update.tree.stored() if isinstance(update.tree, EncodedTree) else update.tree
    return np.asarray(stored[f"{name}@lora_{side}"].astype(np.float64))


def _learning(rounds: int) -> Iterable[Row]:
    adapted = load_task(str(EXAMPLE))
    module = importlib.import_module(adapted.train_data.__module__)  # type: ignore[union-attr]

    def whole() -> object:
        model = module.VisionTransformer()
        model.load_state_dict(module.load_file(module.BASE))
        return model

    full = dataclasses.replace(adapted, name="lora-full", model=whole)
    settings = {"rounds.count": rounds, "train.epochs": 2, "train.lr": 0.01}
    ours = edgefl.simulate(adapted, clients=8, engine="loop", set={**settings, "train.lora_ranks": [4, 8]})
    theirs = edgefl.simulate(full, clients=8, engine="loop", set={**settings, "train.lr": 0.003})
    workload = f"examples/lora, 8 clients, {rounds} rounds"
    for metric, unit, more in (("accuracy", "1", True), ("up_bytes", "kB per client and round", False)):
        seen = [
            one.final["accuracy"] if metric == "accuracy" else one.rounds[-1].up_bytes / 8e3 for one in (ours, theirs)
        ]
        yield Row(
            workload=workload, metric=metric, unit=unit, ours=seen[0], rival="full fine-tuning", theirs=seen[1],
            more_is_better=more,
        )  # fmt: skip


if __name__ == "__main__":
    command(measure, __doc__)()
