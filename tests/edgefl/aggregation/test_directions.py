"""The direction of a metric by its name."""

from __future__ import annotations

import pytest

from edgefl.aggregation.directions import direction_of_name


@pytest.mark.parametrize("name", ["accuracy", "val_accuracy", "F1", "f1/macro", "top 5", "R2"])
def test_higher_is_better(name: str) -> None:
    assert direction_of_name(name) is True


@pytest.mark.parametrize("name", ["loss", "train_loss", "RMSE", "error rate", "accuracy loss"])
def test_lower_is_better(name: str) -> None:
    assert direction_of_name(name) is False


@pytest.mark.parametrize("name", ["", "gain", "lossless", "confusion/0/1"])
def test_a_name_that_does_not_say(name: str) -> None:
    assert direction_of_name(name) is None
