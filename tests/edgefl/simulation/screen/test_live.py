"""A simulation on the screen."""

import dataclasses
import io

import pytest
from rich.console import Console

from edgefl.rounds import LastEvaluation
from edgefl.simulation.screen import live
from edgefl.simulation.screen.live import (
    Progress,
    SweepProgress,
    compare,
    duration_text,
    live_rounds,
    live_sweep,
    size_text,
)
from edgefl.simulation.study.sweep import SweepResult, VariantResult
from edgefl.simulation.study.variants import Variant
from edgefl.terminal.output import Output
from edgefl.testing import make_report

OUTCOME = make_report(
    admitted=8, rejected=1, failed=1, seconds=2.0, up_bytes=1_000_000, down_bytes=500_000, metrics={"accuracy": 0.5},
    reasons={f"c{n}": "no data" for n in range(5)},
)  # fmt: skip


def test_the_time_left_is_told_by_the_last_rounds():
    progress = Progress(21)
    progress.begin("loop", now_s=100.0)
    cells = progress.note(OUTCOME, now_s=103.0)
    assert cells == ("1/21", "8 admitted, 1 rejected, 1 failed", "4", "1.5 MB", "1:00", "accuracy=0.5")
    cells = progress.note(dataclasses.replace(OUTCOME, round=11), now_s=104.0)
    assert cells[4] == "0:20"


def test_nobody_may_know_how_many_rounds_there_will_be():
    progress = Progress(None)
    progress.begin("flower", now_s=0.0)
    assert progress.note(OUTCOME, now_s=1.0)[::4] == ("1", "?")


def test_a_terminal_sees_a_table():
    progress = Progress(2)
    progress.begin("stacked", "measured: [fast]", now_s=0.0)
    progress.note(OUTCOME, now_s=1.0)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(progress.table())
    text = console.export_text()
    assert "engine stacked: measured: [fast]" in text
    assert "accuracy=0.5" in text
    assert "round 1: c0, c1, c2 and 2 more: no data" in text


def test_elsewhere_there_is_a_line_a_round(capsys):
    with live_rounds(Output(), Progress(2)) as screen:
        screen.on_engine("loop", "it was asked for")
        screen.on_round(OUTCOME)
    engine, line = capsys.readouterr().out.splitlines()
    assert engine == "engine loop: it was asked for"
    assert line.startswith("round 1/2: 8 admitted, 1 rejected, 1 failed, 4 clients/s, 1.5 MB moved, ")
    assert line.endswith("accuracy=0.5 (c0, c1, c2 and 2 more: no data)")


def test_a_terminal_is_updated(monkeypatch, capsys):
    monkeypatch.setattr(live.sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(live.sys.stderr, "isatty", lambda: True)
    with live_rounds(Output(), Progress(2)) as screen:
        screen.on_engine("loop", "it was asked for")
        screen.on_round(OUTCOME)
    seen = capsys.readouterr()
    assert "1/2" in seen.err
    assert seen.out == ""  # a line between two drawings would be drawn over


ON_DEVICES = {
    "devices/accuracy": 0.9, "devices/accuracy/std": 0.05, "devices/accuracy/worst_tenth": 0.8, "devices/count": 2.0,
    "devices/loss": 0.1, "devices/loss/std": 0.0,
}  # fmt: skip
TWO = [Variant({"train.lr": lr}) for lr in (1, 2)]
NOT_EVALUATED = dataclasses.replace(OUTCOME, reasons={}, not_evaluated={"c1": "no card"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
    """What a variant's result says."""

    final: dict
    last_evaluation: LastEvaluation = dataclasses.field(default_factory=LastEvaluation)
    interrupted: bool = False

    def as_json(self):
        return {"final": self.final, "seconds": 1.0}


def test_a_sweep_compares_what_devices_evaluated_in_a_column_per_metric(capsys):
    worse = ON_DEVICES | {"devices/accuracy": 0.7, "devices/accuracy/std": 0.2}
    why = LastEvaluation(not_evaluated={"c1": "no card"})
    results = [Ended(final=ON_DEVICES), Ended(final=worse, last_evaluation=why)]
    found = SweepResult(variants=[VariantResult(variant=variant, rounds=[OUTCOME], result=result)
                                  for variant, result in zip(TWO, results, strict=True)])  # fmt: skip
    compare(found, Output())
    head, first, second, *others = capsys.readouterr().out.splitlines()
    assert ("devices/accuracy" in head, "std" in head, "devices/loss" in head) == (True, False, False)
    assert "0.9±0.05 (worst tenth 0.8) *" in first
    assert "0.7±0.2 (worst tenth 0.8)\t" in second
    assert others == [
        "* the best value of a metric",
        "train.lr=2: the last model was not evaluated on devices: c1: no card",
    ]
    assert "devices/accuracy/std" not in found.best


def test_a_sweep_says_why_clients_did_not_evaluate_once_for_each_variant(capsys):
    with live_sweep(Output(), SweepProgress(TWO, [2, 2])) as screen:
        for variant in TWO:
            screen.on_begin(variant)
            screen.on_round(variant, NOT_EVALUATED)
            screen.on_round(variant, dataclasses.replace(NOT_EVALUATED, round=2))
    said = [line for line in capsys.readouterr().out.splitlines() if "not evaluated" in line]
    assert said == [f"train.lr={lr}: not evaluated: c1: no card" for lr in (1, 2)]


def test_a_terminal_sees_the_latest_reason_below_a_sweeps_table():
    progress = SweepProgress(TWO, [2, 2])
    progress.begin(TWO[0].name, now_s=0.0)
    progress.note(TWO[0].name, NOT_EVALUATED, now_s=1.0)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(progress.table())
    assert "train.lr=1, round 1: not evaluated: c1: no card" in console.export_text()


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (2.5e9, "2.5 GB"), (3e17, "3e+05 TB")]
)
def test_sizes(num_bytes, text):
    assert size_text(num_bytes) == text


def test_durations():
    assert [duration_text(seconds) for seconds in (7.4, 60, 3725)] == ["0:07", "1:00", "1:02:05"]
