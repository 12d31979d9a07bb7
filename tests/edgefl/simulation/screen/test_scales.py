"""Limits of an axis: a diverged run is left outside, and named."""

import math

import pytest

from edgefl.simulation.screen.scales import limits_without_outliers


def test_a_diverged_run_is_outside():
    limits, outside = limits_without_outliers({"a": [2.3, 0.3], "b": [2.3, 0.8], "wild": [2.3, 900.0]})
    assert outside == ["wild"]
    assert limits == pytest.approx((0.3 - 0.1, 2.3 + 0.1))


def test_below_as_well_as_above_and_the_usual_ones_stay():
    limits, outside = limits_without_outliers({"a": [0.0, 0.9], "b": [-1.0, 0.5], "wild": [-1e6, -1e9]})
    assert outside == ["wild"]
    assert limits[0] == pytest.approx(-1.0 - 0.05 * 1.9)


@pytest.mark.parametrize(
    "values",
    [
        {"a": [1.0, 100.0]},
        {"a": [0.1, 0.9], "b": [0.2, 0.5]},
        {"a": [0.5, 0.5], "b": [0.5, 0.9]},
        {"a": [0.1, 0.28], "b": [0.1, 0.1], "c": [0.1, 0.62], "failed": [0.108], "failed too": [0.1055]},
        {"a": [], "b": [math.nan, math.inf]},
        {},
    ],
)
def test_nothing_is_hidden_without_need(values):
    assert limits_without_outliers(values) is None


@pytest.mark.parametrize("wild", [[2.0, 1e5], [-1e6, -1e9], [1e30]])
def test_of_two_runs_the_smaller_one_is_shown(wild):
    limits, outside = limits_without_outliers({"wild": wild, "a": [2.0, 1.0]})
    assert outside == ["wild"]
    assert limits == pytest.approx((0.95, 2.05))


def test_values_that_are_not_finite_are_no_span():
    assert limits_without_outliers({"a": [2.0, 1.0], "b": [2.0, math.inf], "c": [2.0, math.nan, 0.5]}) is None
