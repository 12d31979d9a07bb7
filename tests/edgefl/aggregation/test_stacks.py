"""The mean of products of low rank: by hand, by law (order, tiers, ranks, dtypes, steps) and by enemy."""

from __future__ import annotations

import itertools
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from edgefl import trees
from edgefl.aggregation import WeightedMean
from edgefl.aggregation.server_opt import ServerOptimizer
from edgefl.config import TrainConfig
from edgefl.errors import StepFailed, UpdateRejected
from edgefl.guards import RoundGuard, refuse_unsound
from edgefl.records import Plan, Update
from edgefl.settings.server import ServerConfig
from edgefl.trees import Array, EncodedTree, SpooledTree, Tree, factors_of, spec_of, write_tree

ROWS, COLUMNS = 40, 30
NAME = "up@lora"


def start(rows: int = ROWS, columns: int = COLUMNS) -> EncodedTree:
    return EncodedTree({
        f"{NAME}_B": np.zeros((rows, 0), np.float32), f"{NAME}_A": np.zeros((0, columns), np.float32),
        "head": np.zeros(3, np.float32),
    })  # fmt: skip


def update_of(device: str, left: Array, right: Array, weight: float = 1.0, head: float = 0.0) -> Update:
    tree = EncodedTree({f"{NAME}_B": left, f"{NAME}_A": right, "head": np.full(3, head, np.float32)})
    return Update(job="job", round=1, device=device, tree=tree, weight=weight)


def drawn(ranks: list[int], dtype: type = np.float32, seed: int = 0) -> list[Update]:
    rng = np.random.default_rng(seed)
    return [
        update_of(
            f"d{number}", rng.normal(size=(ROWS, rank)).astype(dtype), rng.normal(size=(rank, COLUMNS)).astype(dtype),
            weight=float(rng.integers(1, 100)), head=float(rng.normal()),
        )
        for number, rank in enumerate(ranks)
    ]  # fmt: skip


def wanted_of(updates: list[Update]) -> Array:
    """Return sum_k w_k B_k A_k / sum_k w_k, in float64, without any code of the rule."""
    total = np.zeros((ROWS, COLUMNS))
    for update in updates:
        stored = update.tree.stored()  # type: ignore[attr-defined]
        total += update.weight * (stored[f"{NAME}_B"].astype(np.float64) @ stored[f"{NAME}_A"].astype(np.float64))
    return total / sum(update.weight for update in updates)


def rule_of(updates: list[Update]) -> WeightedMean:
    rule = WeightedMean(start())
    for update in updates:
        rule.add(update)
    return rule


def rank_of(tree: Tree) -> int | None:
    pair = factors_of(tree, NAME)
    return None if pair is None else pair.rank


def test_the_mean_of_products_by_hand() -> None:
    rule = WeightedMean(start(3, 3))
    rule.add(update_of("a", np.array([[1], [0], [0]], np.float32), np.array([[2, 0, 0]], np.float32), weight=1))
    rule.add(update_of("b", np.array([[0], [4], [0]], np.float32), np.array([[0, 1, 0]], np.float32), weight=3))
    mean = rule.result()[NAME]
    assert mean.tolist() == [[0.5, 0, 0], [0, 3, 0], [0, 0, 0]]  # (1 * 2 e11 + 3 * 4 e22) / 4
    # The product of the mean factors is another matrix: ([.25, 3, 0]^T) ([.5, .75, 0]).
    assert mean[1, 0] == 0 != 3 * 0.5


@pytest.mark.parametrize("ranks", [[4, 4, 4], [1, 2, 3], [8, 4, 8, 4, 8, 4, 8, 4], [30]])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_it_is_exact_at_equal_and_unequal_ranks_in_each_dtype(ranks: list[int], dtype: type) -> None:
    updates = drawn(ranks, dtype)
    mean = rule_of(updates).result()
    assert spec_of(mean) == spec_of(start())
    wanted = wanted_of(updates)
    assert np.abs(mean[NAME] - wanted).max() <= 1e-6 * max(1.0, np.abs(wanted).max())
    head = sum(one.weight * one.tree["head"].astype(np.float64) for one in updates) / sum(u.weight for u in updates)
    assert np.allclose(mean["head"], head, atol=1e-6)


def test_factors_stay_factors_until_the_matrix_is_smaller() -> None:
    assert rank_of(rule_of(drawn([4, 8])).result()) == 12
    assert rank_of(rule_of(drawn([8, 9])).result()) == 17  # 17 * 70 = 1190 elements, the matrix has 1200
    assert rank_of(rule_of(drawn([9, 9])).result()) is None


def test_order_does_not_matter() -> None:
    updates = drawn([2, 9, 4, 8])
    for order in itertools.permutations(updates):
        assert np.abs(rule_of(list(order)).result()[NAME] - wanted_of(updates)).max() <= 1e-6 * 30


@pytest.mark.parametrize("travels", [True, False])
@pytest.mark.parametrize("ranks", [[1, 2, 1, 2, 1, 2], [4, 8] * 4])
def test_tiers_are_exact_at_any_depth(ranks: list[int], travels: bool) -> None:
    updates = drawn(ranks)

    def sent(rule: WeightedMean) -> WeightedMean:
        above = WeightedMean(start())
        above.merge(rule.partial_mean() if travels else rule.partial())
        return above

    first, second = sent(rule_of(updates[:1])), rule_of(updates[1:4])
    second = sent(sent(second))  # three tiers
    top = WeightedMean(start())
    for tier in (first, second):
        top.merge(tier.partial_mean() if travels else tier.partial())
    for update in updates[4:]:
        top.add(update)
    wanted = wanted_of(updates)
    assert np.abs(top.result()[NAME] - wanted).max() <= 1e-6 * np.abs(wanted).max()


def test_a_sum_travels_as_factors_while_they_are_smaller() -> None:
    assert rank_of(rule_of(drawn([2, 3])).partial_mean().total) == 5
    assert rank_of(rule_of(drawn([20, 20])).partial_mean().total) is None


def test_wholes_and_factors_add_up() -> None:
    updates = drawn([2, 3, 4])
    whole = {NAME: updates[1].tree[NAME], "head": updates[1].tree["head"]}
    mixed = [updates[0], Update(job="job", round=1, device="d1", tree=whole, weight=updates[1].weight), updates[2]]
    assert np.abs(rule_of(mixed).result()[NAME] - wanted_of(updates)).max() <= 1e-6 * 30


def test_a_large_model_reads_factors_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "LARGE_BYTES", 100)
    for number, ranks in enumerate(([2, 3], [20, 20, 4])):
        updates = drawn(list(ranks))
        rule = WeightedMean(start())
        for update in updates:
            path = tmp_path / f"{number}-{update.device}"
            with path.open("wb") as file:
                write_tree(update.tree, file)
            rule.add(Update(job="job", round=1, device=update.device, tree=SpooledTree(path), weight=update.weight))
        mean = rule.result()
        assert np.abs(mean[NAME] - wanted_of(updates)).max() <= 1e-6 * 30
        new = ServerOptimizer(ServerConfig(), gradient=False).step(start(), mean)
        checked = refuse_unsound(plan_of(start()), {}, new)
        assert np.abs(checked[NAME] - wanted_of(updates)).max() <= 1e-6 * 30
        assert checked["head"].shape == (3,)


def plan_of(parameters: Tree) -> Plan:
    return Plan(job="job", round=1, parameters=parameters, clients=("d0", "d1"), train=TrainConfig(), deadline_s=1.0)


def test_rounds_add_factors_until_the_matrix_is_smaller() -> None:
    step, parameters, wanted = ServerOptimizer(ServerConfig(lr=0.5), gradient=False), start(), np.zeros((ROWS, COLUMNS))
    ranks: list[int | None] = []
    for number in range(4):
        updates = drawn([2, 4], seed=number)
        parameters = step.step(parameters, rule_of(updates).result())  # type: ignore[assignment]
        wanted += 0.5 * wanted_of(updates)
        assert np.abs(parameters[NAME] - wanted).max() <= 1e-6 * max(1.0, np.abs(wanted).max())
        ranks.append(rank_of(parameters))
    assert ranks == [6, 12, None, None]


def test_another_server_optimizer_steps_the_whole_matrix() -> None:
    updates = drawn([2, 4])
    config = ServerConfig(lr=1.0, options={"momentum": 0.5})
    step = ServerOptimizer(config, gradient=False)
    once = step.step(start(), rule_of(updates).result())
    twice = step.step(once, rule_of(updates).result())
    assert rank_of(twice) is None
    assert np.abs(twice[NAME] - 2.5 * wanted_of(updates)).max() <= 1e-5  # 1 + (1 + momentum)


@pytest.mark.parametrize(
    ("left", "right", "fault"),
    [
        (np.full((ROWS, 1), np.nan), np.ones((1, COLUMNS)), "'up@lora' holds NaN or infinity, in its factors"),
        (np.ones((ROWS, 1)), np.full((1, COLUMNS), np.inf), "'up@lora' holds NaN or infinity, in its factors"),
        (np.full((ROWS, 1), 1e30), np.full((1, COLUMNS), 1e30), "'up@lora' is beyond the range of float32"),
        (np.ones((ROWS, 31)), np.ones((31, COLUMNS)), "'up@lora' has factors of rank 31; a matrix of 40 x 30 has"),
        (np.ones((ROWS, 1)), np.ones((1, 29)), r"'up@lora' is float32\[40, 29\], not float32\[40, 30\]"),
        (np.ones((41, 1)), np.ones((1, COLUMNS)), r"'up@lora' is float32\[41, 30\], not float32\[40, 30\]"),
    ],
)
def test_hostile_factors_are_refused_by_name(left: Array, right: Array, fault: str) -> None:
    update = update_of("d0", left.astype(np.float32), right.astype(np.float32))
    with pytest.raises(UpdateRejected, match=fault):
        RoundGuard(plan_of(start())).admit(update)


def test_large_factors_whose_product_is_small_are_admitted() -> None:
    left, right = np.zeros((ROWS, 2), np.float32), np.zeros((2, COLUMNS), np.float32)
    left[:, 0], right[1] = 1e30, 1e30
    RoundGuard(plan_of(start())).admit(update_of("d0", left, right))


def test_a_hostile_sum_is_refused_by_name() -> None:
    partial = rule_of(drawn([2])).partial_mean()
    pair = {f"{NAME}_B": np.full((ROWS, 1), np.nan, np.float32), f"{NAME}_A": np.ones((1, COLUMNS), np.float32)}
    lie = EncodedTree({**pair, "head": np.zeros(3, np.float32)})
    with pytest.raises(UpdateRejected, match="partial sum: tensor 'up@lora' holds NaN"):
        WeightedMean(start()).merge(
            type(partial)(total=lie, weight=1.0, contributors=("d0",), is_mean=True)
        )  # fmt: skip


def test_a_step_that_leaves_the_range_fails_the_round() -> None:
    huge = np.full((ROWS, 1), 1e20, np.float32), np.full((1, COLUMNS), 1e18, np.float32)
    parameters = start()
    step = ServerOptimizer(ServerConfig(lr=10.0), gradient=False)
    new = step.step(parameters, rule_of([update_of("d0", *huge)]).result())
    with pytest.raises(StepFailed, match="'up@lora' is beyond the range of float32"):
        refuse_unsound(plan_of(parameters), {}, new)
