"""Thousands of rounds of one job: the cloud's memory and database stay as they are, and its follower has each round."""

import psutil
import pytest

WARM, END = 1500, 3500
WAIT_S = 900
MAX_RSS_GROWTH = 1_500_000  # bytes over 2,000 rounds; a stream that read all rounds at each cost four times as much
MAX_DATABASE_GROWTH = 100_000  # bytes; rows that stay would be 700,000


@pytest.mark.timeout(3 * WAIT_S)
def test_memory_and_database_are_flat_over_rounds(embedded_fleet, three, tmp_path, round_is_right):
    fleet = embedded_fleet
    fleet.add_agent("x", delta=0.001, weight=1, calls=tmp_path / "x.calls")
    run = fleet.start_run("numbers", "rounds.clients=1", rounds=END)
    cloud, database = psutil.Process(fleet.cloud.pid), fleet.home / "cloud.db"
    sizes = []
    for number in (WARM, END - 10):
        fleet.cloud.wait_for(f"round={number} admitted=1", WAIT_S)
        sizes.append((cloud.memory_info().rss, database.stat().st_size))
    result, _ = fleet.finish_run(run, WAIT_S)
    assert [one["round"] for one in result["rounds"]] == list(range(1, END + 1))
    (rss, stored), (rss_after, stored_after) = sizes
    assert rss_after - rss < MAX_RSS_GROWTH
    assert stored_after - stored < MAX_DATABASE_GROWTH
    fleet.agents.pop("x").stop()
    three(fleet)
    round_is_right(fleet)
