"""The rows of the benchmark, from small runs of each part."""

import pytest

from benchmarks import goodput
from benchmarks.large_round import LargeRound
from benchmarks.workload import RunFailedError

SEEN = LargeRound(
    cloud_peak_mb=200.0, cloud_idle_mb=100.0, region_peak_mb=150.0, region_idle_mb=90.0, seconds=3.0,
    fold_peak_mb=90.0, fold_s=1.0, is_identical=True,
)  # fmt: skip


def test_each_part_has_its_row(monkeypatch):
    monkeypatch.setattr(goodput, "FEW_ROUNDS", 10)
    monkeypatch.setattr(goodput, "UPDATE_BYTES", 400_000)
    monkeypatch.setattr(goodput, "large_round", lambda num_bytes, devices, region="": SEEN)
    rows = list(goodput.measure(quick=True))
    assert [row.metric for row in rows] == [
        *["goodput, rounds.grace=auto", "goodput, rounds.grace=auto and rounds.late=next"] * 2,
        "fold rate", "peak RSS of the cloud", "peak RSS of a fold", "same bits in other blocks",
        "peak RSS of the region", "peak RSS of the cloud", "same bits in other blocks",
    ]  # fmt: skip
    assert all(row.skipped is None and row.ours is not None for row in rows)
    assert [row.met for row in rows[5:]] == [True] * 6


def test_a_large_round_that_fails_says_why(monkeypatch):
    def fails(_num_bytes, _devices, _region=""):
        raise RunFailedError("no space left")

    monkeypatch.setattr(goodput, "large_round", fails)
    for part in (goodput._large, goodput._large_below_a_region):
        (row,) = part(1)
        assert (row.skipped, row.met) == ("no space left", False)
    assert pytest.approx(goodput.DILOCO_GOODPUT) == 0.88
