"""A round in a real cloud whose model is read by blocks there: little memory, the same bits in other blocks."""

from benchmarks.large_round import large_round


def test_two_devices_with_a_large_model():
    seen = large_round(160_000_000, 2)  # above the limit of what is in memory as a whole
    assert seen.is_identical
    assert seen.cloud_peak_mb - seen.cloud_idle_mb < 100
    assert seen.fold_peak_mb < 200
    assert min(seen.seconds, seen.fold_s) > 0


def test_two_devices_with_a_large_model_below_a_region():
    seen = large_round(160_000_000, 2, "north")
    assert seen.is_identical
    assert seen.region_peak_mb - seen.region_idle_mb < 100
    assert seen.cloud_peak_mb - seen.cloud_idle_mb < 100
