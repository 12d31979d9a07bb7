import json
import sys

import pytest

from benchmarks import simulation_contest
from benchmarks.simulation_contest import REPORT, Contestant, Side, module, run
from benchmarks.workload import RunFailedError

SAYS = 'print("noise"); print(\'{"round_s": [9.0, 1.0, 3.0], "accuracy": 0.5, "detail": {"a": 1}}\', "tail")'
HOLDS = "import time; held = b'x' * 150_000_000; time.sleep(0.6);"


def script(code: str) -> Contestant:
    return Contestant(name="script", command=lambda _folder, _rounds: [sys.executable, "-c", code])


def test_a_result_is_read_from_among_the_noise() -> None:
    outcome = run(script(SAYS), 3)
    assert (outcome.round_s, outcome.accuracy, outcome.detail) == ((9.0, 1.0, 3.0), 0.5, {"a": 1})
    assert (outcome.rest_s, outcome.peak_mb) == (2.0, None)
    assert 0 < outcome.command_s < 30


def test_memory_is_looked_at_in_a_run_of_its_own() -> None:
    side = Side(script(HOLDS + SAYS), rounds=3)
    side.turn(memory=True)
    assert side.outcomes == []
    assert 150 < side.peak_mb < 400


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("raise SystemExit('no luck')", "ended with status 1: no luck"),
        ("print('nothing')", "printed no result"),
        (SAYS.replace(", 3.0", ""), "2 rounds instead of 3"),
    ],
)
def test_a_failed_run_is_said_and_not_run_again(code, why) -> None:
    side = Side(script(code), rounds=3, repeats=2)
    side.turn()
    side.turn()
    assert why in side.skipped
    assert (side.rate(100), side.accuracy, side.peak_mb) == (None, None, None)


def test_a_run_that_does_not_end_is_ended(monkeypatch) -> None:
    monkeypatch.setattr(simulation_contest, "RUN_S", 0.5)
    with pytest.raises(RunFailedError, match=r"had not ended within 0\.5 s"):
        run(script("import time; time.sleep(60)"), 3)


def test_rates_by_hand() -> None:
    side = Side(script(SAYS), rounds=3, repeats=2)
    for _ in range(3):
        side.turn()
    assert len(side.outcomes) == 2
    assert side.rate(100) == 50.0
    assert side.detail()["round_s"] == [[9.0, 1.0, 3.0]] * 2


def test_an_absent_package_is_named() -> None:
    absent = Contestant(name="rival", command=script(SAYS).command, needs=("numpy", "no-such-package"))
    side = Side(absent, rounds=3)
    assert side.skipped == "no-such-package must be installed: `make bench` installs them"
    assert side.name.startswith("rival 2")  # the version of the first


def test_the_report_of_the_command_line_is_read_too() -> None:
    said = {"rounds": [{"seconds": 2.0}, {"seconds": 1.0}], "final": {"accuracy": 0.25}, "engine": "loop"}
    code = f"import pathlib, sys; pathlib.Path(sys.argv[1]).write_text({json.dumps({**said, 'engine_reason': 'w'})!r})"
    contestant = Contestant(name="x", command=lambda folder, _rounds: [sys.executable, "-c", code, folder / REPORT])
    outcome = run(contestant, 2)
    assert (outcome.round_s, outcome.accuracy, outcome.detail) == ((2.0, 1.0), 0.25, {"engine": "loop", "why": "w"})


def test_ours_in_a_process() -> None:
    outcome = run(Contestant(name="edgefl", command=module("ours", "digits-lr", "--engine", "loop")), 2)
    assert len(outcome.round_s) == 2
    assert outcome.detail["engine"] == "loop"
    assert 0.1 < outcome.accuracy < 1
