"""A curve in one line: heights by hand, groups, gaps, and terminals without block characters."""

from __future__ import annotations

import math

import pytest

from edgefl.terminal.curve import curve_text


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], "▁▂▃▄▅▆▇█"),
        ([7, 0], "█▁"),
        ([2, 2], "▅▅"),
        ([0, math.nan, 8], "▁ █"),
        ([math.inf, 1, 3], " ▁█"),
        ([math.nan], ""),
        ([], ""),
        ([-1e308, 1e308], "▁█"),
    ],
)
def test_the_heights_by_hand(values, shown):
    assert curve_text(values, 8) == shown


def test_many_values_are_the_means_of_equal_groups():
    assert curve_text([0, 0, 8, 8, 4, 4], 3) == "▁█▅"
    assert curve_text([0, math.nan, 8, 8], 2) == "▁█"
    assert len(curve_text(range(1001), 40)) == 40


def test_a_terminal_without_block_characters_gets_ascii():
    assert curve_text([0, 5, 10], 3, "ascii") == "_=#"
    assert curve_text([0, 10], 3, None) == "_#"
