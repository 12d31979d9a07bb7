"""Random states of two parts of one process: neither notices what the other draws."""

import random

import numpy as np
import pytest
import torch

from edgefl.training.own_randomness import OwnRandomness, state_digests


def draw():
    return random.random(), float(np.random.normal()), float(torch.rand(()))


def set_all(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def fail_inside(own):
    with own.used():
        set_all(7)
        raise ZeroDivisionError


@pytest.fixture(autouse=True)
def _seeded():
    set_all(5)


def test_each_part_continues_its_own_stream():
    set_all(5)
    wanted = [draw() for _ in range(3)]
    before = state_digests()
    set_all(6)
    wanted_inside = [draw() for _ in range(2)]
    set_all(6)
    own = OwnRandomness(before)  # seeded since `before`: begins as it is now
    set_all(5)
    seen, seen_inside = [draw()], []
    for _ in range(2):
        with own.used():
            seen_inside.append(draw())
        seen.append(draw())
    assert seen == wanted
    assert seen_inside == wanted_inside


def test_unseeded_states_are_others_than_outside_and_the_same_each_time():
    first, second = OwnRandomness(), OwnRandomness(state_digests())
    with first.used():
        seen = draw()
    with second.used():
        assert draw() == seen
    outside = draw()
    assert seen[:2] != outside[:2]
    assert seen[0] != outside[0]
    assert seen[1] != outside[1]
    assert seen[2] == outside[2]  # a new process begins with one and the same state of torch


def test_only_what_was_seeded_is_copied():
    before = state_digests()
    np.random.seed(9)
    own = OwnRandomness(before)
    with own.used():
        inside = draw()
    outside = draw()
    assert inside[0] != outside[0]
    assert inside[1] == outside[1]


def test_an_error_inside_and_a_seed_inside_change_nothing_outside():
    wanted = draw()
    set_all(5)
    own = OwnRandomness()
    with pytest.raises(ZeroDivisionError):
        fail_inside(own)
    assert draw() == wanted
    set_all(7)
    wanted = draw()
    with own.used():
        assert draw() == wanted
