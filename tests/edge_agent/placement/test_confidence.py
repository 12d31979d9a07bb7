"""Confidence by hand: of scores, of distributions, and of what is neither."""

from __future__ import annotations

import numpy as np
import pytest

from edge_agent.placement.confidence import confident_rows
from edgefl.errors import ProtocolError


def test_scores_and_distributions() -> None:
    scores = np.array([[0.0, np.log(3)], [0.0, 0.0], [-5.0, 100_000.0]], np.float32)  # 0.75, 0.5, 1
    assert confident_rows({"y": scores}, 0.7).tolist() == [True, False, True]
    shares = np.array([[0.75, 0.25], [0.5, 0.5]], np.float32)
    assert confident_rows({"y": shares}, 0.7).tolist() == [True, False]
    assert confident_rows({"y": shares}, 0.75).tolist() == [True, False]


def test_of_several_decisions_the_least_sure_counts() -> None:
    values = np.array([[[9.0, 0], [9, 0]], [[9, 0], [1, 1]]], np.float32)
    assert confident_rows({"label": np.zeros((2, 1), np.int64), "y": values}, 0.9).tolist() == [True, False]


def test_nan_is_not_confident_and_no_rows_are_none() -> None:
    values = np.array([[np.nan, 1.0], [np.inf, 0.0]], np.float32)
    assert confident_rows({"y": values}, 0.1).tolist() == [False, False]
    assert confident_rows({"y": np.zeros((0, 2), np.float32)}, 0.5).tolist() == []


def test_a_model_without_scores_cannot_be_the_first_of_a_cascade() -> None:
    with pytest.raises(ProtocolError, match="needs scores of at least two classes"):
        confident_rows({"label": np.zeros((2, 3), np.int64), "one": np.zeros((2, 1), np.float32)}, 0.5)
