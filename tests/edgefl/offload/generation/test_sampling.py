"""Choices by hand and by law: greedy, the nucleus, shares, and that a seed and a position are all they depend on."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from edgefl.errors import ProtocolError
from edgefl.offload.generation.sampling import MAX_SEED, Sampling, choose

LOGITS = np.log(np.array([0.1, 0.2, 0.4, 0.3], np.float32))


def drawn(sampling, num=4000):
    return Counter(choose(LOGITS, sampling, position) for position in range(num))


def test_greedy_takes_the_largest_and_the_first_of_equals() -> None:
    assert choose(np.array([1.0, 3.0, 3.0], np.float32), Sampling(), 5) == 1


def test_shares_follow_the_probabilities() -> None:
    counts = drawn(Sampling(temperature=1.0, seed=3))
    assert [round(counts[token] / 4000, 1) for token in range(4)] == [0.1, 0.2, 0.4, 0.3]


def test_the_nucleus_has_the_most_likely_tokens_that_reach_top_p() -> None:
    assert set(drawn(Sampling(temperature=1.0, top_p=0.6, seed=1))) == {2, 3}  # 0.4 + 0.3 >= 0.6
    assert set(drawn(Sampling(temperature=1.0, top_p=0.3, seed=1))) == {2}
    counts = drawn(Sampling(temperature=1.0, top_p=0.6, seed=1))
    assert abs(counts[2] / 4000 - 4 / 7) < 0.03


def test_a_low_temperature_nears_greedy() -> None:
    assert drawn(Sampling(temperature=0.05, seed=2))[2] > 3900


def test_a_choice_depends_on_seed_and_position_alone() -> None:
    one = [choose(LOGITS, Sampling(temperature=1.0, seed=7), position) for position in range(50)]
    again = [choose(LOGITS, Sampling(temperature=1.0, seed=7), position) for position in reversed(range(50))][::-1]
    other = [choose(LOGITS, Sampling(temperature=1.0, seed=8), position) for position in range(50)]
    assert one == again != other


@pytest.mark.parametrize(
    "values",
    [{"temperature": -0.1}, {"temperature": 2.1}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1},
     {"seed": -1}, {"seed": MAX_SEED + 1}],
)  # fmt: skip
def test_values_out_of_range_are_refused(values) -> None:
    with pytest.raises(ProtocolError, match=next(iter(values))):
        Sampling(**values)


def test_logits_that_are_not_finite_are_refused() -> None:
    for value in (np.nan, np.inf):
        with pytest.raises(ProtocolError, match="not finite"):
            choose(np.array([0.0, value], np.float32), Sampling(temperature=1.0), 0)
