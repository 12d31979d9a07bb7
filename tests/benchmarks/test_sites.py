"""What the benchmark of sites counts; `make soak` runs its DiLoCo part for a few rounds."""

from __future__ import annotations

import pytest

from benchmarks.sites import diloco, ring_bytes


def test_a_rings_bytes_by_hand():
    # 8 numbers of 4 bytes: each of 8 processes sends 2 * 7 parts of one number, and receives as many
    assert ring_bytes(processes=8, steps=1, parameters=8) == 2 * 2 * 7 * 4
    assert ring_bytes(processes=2, steps=3, parameters=10) == 3 * 2 * 40


@pytest.mark.soak
def test_diloco_beside_synchronous_training():
    loss, moved, loss_in_few_bits, moved_in_few_bits, loss_in_turn, moved_in_turn = diloco(rounds=2, steps=20)
    for one in (loss, loss_in_few_bits, loss_in_turn):
        assert one.ours == pytest.approx(one.theirs, rel=0.3)
    assert moved.ratio == pytest.approx(20 * 7 / 4, rel=0.05)
    assert moved_in_few_bits.ratio == pytest.approx(20 * 7 / 4 * 8 / 3, rel=0.05)
    assert moved_in_turn.ratio > 1.4 * moved.ratio  # the first round still brings the whole model
