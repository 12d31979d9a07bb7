import pytest

from benchmarks import rounds
from benchmarks.rounds import TEN_LARGE, TEN_SMALL, TWO_LARGE, TWO_SMALL
from benchmarks.workload import RunFailedError, RunResult


def one_round(seconds: float, fit_s: float, admitted: int = 2, down_bytes: int = 200_000) -> dict:
    return {"seconds": seconds, "admitted": admitted, "down_bytes": down_bytes, "metrics": {"train_fit_s": fit_s}}


def test_the_longer_of_what_is_said_and_what_the_clock_shows() -> None:
    slow_between = [one_round(1.0, 10.0), one_round(0.1, 11.0), one_round(0.1, 11.5)]
    assert rounds.seconds_of(slow_between, TWO_SMALL) == (1.0, (1.0, 0.5))
    slow_within = [one_round(1.0, 10.0), one_round(0.3, 10.1), one_round(0.3, 10.2)]
    assert rounds.seconds_of(slow_within, TWO_SMALL) == (1.0, (0.3, 0.3))


def test_a_round_without_an_agent_is_no_result() -> None:
    with pytest.raises(RunFailedError, match=r"\[2, 1\]"):
        rounds.seconds_of([one_round(1, 1), one_round(1, 2, admitted=1)], TWO_SMALL)


def test_a_round_without_a_new_model_is_no_result() -> None:
    with pytest.raises(RunFailedError, match=r"without a new model: \[200000, 0\] bytes"):
        rounds.seconds_of([one_round(1, 1), one_round(1, 2, down_bytes=0)], TWO_SMALL)


@pytest.fixture
def contestants(monkeypatch):
    """Contestants that answer by hand: seconds and centre by name and workload."""
    turns = []

    def of(name: str, round_s: float, centre: dict, idle_mb: float | None = None):
        def run(workload, count, deadline_s):
            turns.append((str(workload), name))
            return RunResult(first_s=9.0, round_s=(round_s,) * count, centre_mb=centre.get(workload), idle_mb=idle_mb)

        return run

    monkeypatch.setattr(rounds, "run_ours", of("ours", 0.05, {TWO_LARGE: 500.0, TEN_LARGE: 520.0}, 80.0))
    monkeypatch.setattr(rounds.flower_rival, "run", of("flower", 10.0, {TWO_LARGE: 1000.0, TEN_LARGE: 4500.0}, 255.0))
    monkeypatch.setattr(rounds.flower_rival, "name", lambda: "Flower 1.41.0")
    monkeypatch.setattr(rounds.floor, "run", of("floor", 0.02, {}))
    return turns


def test_the_whole_table_by_hand(contestants) -> None:
    table = {(row.workload, row.metric): row for row in rounds.measure(quick=False)}
    time = table["10 x 0.1 MB", "a round"]
    assert (time.ours, time.theirs, time.limit, time.met) == (0.05, 10.0, 0.02, True)
    assert (time.ratio, time.over_limit) == (pytest.approx(200), pytest.approx(2.5))
    memory = table["10 x 100 MB", "peak RSS of the centre"]
    assert (memory.ours, memory.theirs, memory.met) == (520.0, 4500.0, True)
    growth = table["10 x 100 MB over 2 x 100 MB", "peak RSS of the centre"]
    assert (growth.ours, growth.theirs, growth.met) == (1.04, 4.5, True)
    idle = table["2 x 0.1 MB", "idle RSS of an agent"]
    assert (idle.ours, idle.theirs, idle.met) == (80.0, 255.0, True)


def test_the_contestants_take_turns(contestants) -> None:
    list(rounds.measure(quick=False))
    turns = [name for workload, name in contestants if workload == str(TEN_SMALL)]
    assert turns == ["ours", "flower", "floor"] * 2


def test_quick_leaves_out_the_rivals_large_runs_and_says_so(contestants) -> None:
    table = {(row.workload, row.metric): row for row in rounds.measure(quick=True)}
    assert ("10 x 100 MB", "flower") not in contestants
    skipped = table["10 x 100 MB", "a round"]
    assert "left out by --quick" in skipped.skipped
    assert not skipped.met
    assert skipped.ours == 0.05
    assert table["2 x 0.1 MB", "a round"].skipped is None


def test_a_failed_run_is_a_skipped_row_and_not_run_again(contestants, monkeypatch) -> None:
    def fails(*_args):
        contestants.append(("any", "failed"))
        raise RunFailedError("no cloud today")

    monkeypatch.setattr(rounds, "run_ours", fails)
    table = list(rounds.measure(quick=False))
    assert all(not row.met and "no cloud today" in (row.skipped or "") for row in table)
    assert contestants.count(("any", "failed")) == 4  # once a workload


def test_an_absent_rival_is_said(contestants, monkeypatch) -> None:
    monkeypatch.setattr(rounds.flower_rival, "name", lambda: None)
    assert all("not installed" in (row.skipped or "") for row in rounds.measure(quick=True))


def test_ours_with_real_processes() -> None:
    result = rounds.run_ours(TWO_SMALL, rounds=3, deadline_s=90)
    assert len(result.round_s) == 3
    assert min(result.round_s) > 0
    assert result.idle_mb is not None
    assert result.centre_mb is not None
    assert 20 < result.idle_mb < result.centre_mb < 1000
