"""Seeded draws by key: even, independent of order, and spread as they are told to be."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from edgefl.errors import ConfigError
from edgefl.simulation.world.draws import Spread, stream_key, uniform, uniforms

MANY = np.arange(100_000)


def test_a_draw_depends_on_its_key_alone() -> None:
    alone, among = uniform(999_999, 1, "speed"), uniforms(np.array([5, 999_999]), 1, "speed")
    assert alone == among[1]
    assert [uniform(index, 9, "x") for index in range(100)] == uniforms(np.arange(100), 9, "x").tolist()
    assert alone != uniform(999_999, 2, "speed") != uniform(999_999, 1, "rtt_s")
    assert stream_key(0, "a", 1) != stream_key(0, "a", 2)


def test_draws_are_even_and_neighbours_are_strangers() -> None:
    drawn = uniforms(MANY, 7, "any")
    assert 0 < drawn.min() < drawn.max() < 1
    counts = np.bincount((drawn * 100).astype(int), minlength=100)
    assert abs(counts - 1000).max() < 5 * math.sqrt(1000)
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(drawn, uniforms(MANY, 8, "any"))[0, 1]) < 0.02


@pytest.mark.parametrize("kind", ["normal", "lognormal"])
def test_a_spread_has_the_mean_and_std_that_it_names(kind: str) -> None:
    spread = Spread(kind=kind, mean=100.0, std=20.0)
    values = np.array([spread.quantile(share) for share in uniforms(MANY[:20_000], 3, "speed")])
    assert values.mean() == pytest.approx(100, abs=4 * 20 / math.sqrt(20_000))
    assert values.std() == pytest.approx(20, rel=0.05)


def test_quantiles_by_hand() -> None:
    assert Spread(mean=3.0).quantile(0.9) == 3.0
    assert Spread(kind="uniform", min=2.0, max=4.0).quantile(0.25) == 2.5
    assert Spread(kind="normal", mean=5.0, std=1.0).quantile(0.5) == 5.0
    assert Spread(kind="lognormal", mean=5.0, std=1.0).quantile(0.5) == pytest.approx(5 / math.sqrt(1 + 1 / 25))
    assert Spread(kind="normal", mean=1.0, std=9.0).quantile(0.001) == 0.0  # cut
    assert Spread(kind="lognormal", mean=1.0, std=9.0, max=2.0).quantile(0.999) == 2.0


@pytest.mark.parametrize(
    ("told", "fault"),
    [
        ({"kind": "gauss"}, "kind must be one of: constant"),
        ({"mean": -1.0}, "mean and std"),
        ({"mean": math.nan}, "mean and std"),
        ({"std": math.inf}, "mean and std"),
        ({"min": 2.0, "max": 1.0}, "min <= max"),
        ({"min": math.nan}, "min <= max"),
        ({"kind": "uniform"}, "finite max"),
        ({"kind": "lognormal"}, "above 0"),
    ],
)
def test_a_spread_that_cannot_be_is_refused(told: dict[str, Any], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        Spread(**told)
