import json

import pytest

from benchmarks import flower_rival
from benchmarks.workload import RunFailedError, Workload

SMALL = Workload(clients=2, megabytes=0.1)


@pytest.mark.soak
def test_a_real_federation_of_two() -> None:
    result = flower_rival.run(SMALL, rounds=1, deadline_s=200)
    assert len(result.round_s) == 1
    assert result.round_s[0] > 0
    assert result.centre_mb is not None
    assert result.centre_mb > 100


def test_a_report_by_hand(tmp_path) -> None:
    file = tmp_path / "report.json"
    file.write_text(json.dumps({"ends_s": [1.0, 5.0, 7.0], "replies": [2, 2], "peak_rss_kib": 1000}))
    result = flower_rival.result_of(file, SMALL, superlink_mb=100.0, idle_mb=200.0)
    assert (result.first_s, result.round_s, result.idle_mb) == (4.0, (2.0,), 200.0)
    assert result.centre_mb == pytest.approx(101.024)


def test_a_round_that_lost_a_client_is_no_result(tmp_path) -> None:
    file = tmp_path / "report.json"
    file.write_text(json.dumps({"ends_s": [1.0, 5.0, 7.0], "replies": [2, 1], "peak_rss_kib": 1}))
    with pytest.raises(RunFailedError, match=r"had \[2, 1\] replies"):
        flower_rival.result_of(file, SMALL, superlink_mb=1.0, idle_mb=1.0)


def test_no_report_is_no_result(tmp_path) -> None:
    with pytest.raises(RunFailedError, match="left no report"):
        flower_rival.result_of(tmp_path / "none.json", SMALL, superlink_mb=1.0, idle_mb=1.0)
