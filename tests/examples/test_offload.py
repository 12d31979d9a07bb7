"""The example's two models learn the digits, and fit together: the same inputs and outputs, one much smaller."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import edgefl
from edgefl.task import load_task
from edgefl.training import initial_parameters

FOLDER = Path(__file__).parents[2] / "examples" / "offload"


def size(task) -> int:
    return sum(one.size for one in initial_parameters(task).values())


def test_the_fall_back_fits_the_large_model() -> None:
    large = load_task(str(FOLDER))
    pictures, labels = large.test_data()
    outputs = large.model()(torch.from_numpy(pictures[:2])).shape
    large_size = size(large)
    small = load_task(str(FOLDER / "small"))
    same_pictures, same_labels = small.test_data()
    np.testing.assert_array_equal(same_pictures, pictures)
    np.testing.assert_array_equal(same_labels, labels)
    assert small.model()(torch.from_numpy(pictures[:2])).shape == outputs == (2, 10)
    assert (size(small), large_size) == (2710, 4_218_058)


@pytest.mark.parametrize(("folder", "least"), [(FOLDER, 0.85), (FOLDER / "small", 0.75)])
def test_each_learns_in_three_rounds(folder, least) -> None:
    found = edgefl.simulate(str(folder), clients=2, config=FOLDER / "config.toml")
    assert found.final["accuracy"] >= least
