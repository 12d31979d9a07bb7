"""What is handed on after a round."""

import numpy as np

from edgefl.simulation.isolation.messages import OnlyNew


def test_an_array_travels_once_while_it_is_the_same():
    frozen, head = np.zeros(3), np.ones(2)
    only_new = OnlyNew()
    assert only_new.first
    assert only_new.of({"frozen": frozen, "head": head}).keys() == {"frozen", "head"}
    assert not only_new.first
    assert only_new.of({"frozen": frozen, "head": head + 1}).keys() == {"head"}
    assert only_new.of({"frozen": frozen.copy(), "head": head}).keys() == {"frozen", "head"}
