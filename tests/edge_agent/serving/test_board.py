"""The page of models at work, as its writer and its reader see it."""

from __future__ import annotations

import os

import pytest

from edge_agent.serving.board import LANE_BYTES, Board, label_of, new_descriptor


def test_what_is_at_work_is_seen_through_another_map_of_the_page():
    descriptor = new_descriptor()
    reader, writer = Board(descriptor), Board(descriptor)
    os.close(descriptor)
    assert reader.running() == set()
    writer.enter(0, label_of("digits"))
    writer.enter(3, label_of("faces"))
    assert reader.running() == {"digits", "faces"}
    writer.leave(0)
    assert reader.running() == {"faces"}
    writer.clear()
    assert reader.running() == set()


@pytest.mark.parametrize("name", ["a", "x" * 64, "x" * 100, "é" * 40])
def test_a_label_fills_its_lane_and_no_more(name):
    board = Board()
    board.enter(1, label_of(name))
    assert len(label_of(name)) == LANE_BYTES
    assert all(name.startswith(one) for one in board.running())
    board.leave(1)
    assert board.running() == set()
