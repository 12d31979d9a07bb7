"""A sweep on the screen."""

import dataclasses
import io

import numpy as np
from rich.console import Console

from edgefl.simulation.screen import live as module
from edgefl.simulation.screen.live import SweepProgress, compare, live_sweep
from edgefl.simulation.study.report import SimulationResult
from edgefl.simulation.study.sweep import SweepResult, VariantResult
from edgefl.simulation.study.variants import Variant
from edgefl.terminal.output import Output
from edgefl.testing import make_report

OUTCOME = make_report(admitted=8, seconds=2.0, up_bytes=1_000_000, down_bytes=500_000, metrics={"accuracy": 0.5})
BETTER = {"accuracy": 0.75}
SLOW, FAST = Variant({"train.lr": 0.1}), Variant({"train.lr": 0.9})


def result(**changes):
    return SimulationResult(
        task="digits", engine="loop", engine_reason="", rounds=[OUTCOME], final={"accuracy": 0.5}, seconds=4.0,
        round_seconds=2.0, peak_rss_mb=1.0, parameters={"w": np.zeros(1)}, model={}, **changes,
    )  # fmt: skip


def done(**changes):
    return VariantResult(variant=SLOW, rounds=[OUTCOME], result=result(**changes))


FAILED = VariantResult(variant=FAST, rounds=[], error="round 1: no updates" + "." * 1000)


def shown(progress):
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(progress.table())
    return [" ".join(line.split()) for line in console.export_text().splitlines()]


def test_a_row_a_variant():
    progress = SweepProgress([SLOW, FAST], [5, None])
    progress.begin(SLOW.name, now_s=0.0)
    progress.note(SLOW.name, OUTCOME, now_s=2.0)
    assert shown(progress)[1:] == ["train.lr=0.1 running 1/5 4 0:08 accuracy=0.5", "train.lr=0.9 waiting - -"]
    progress.end(done())
    progress.end(FAILED)
    assert shown(progress)[1:] == ["train.lr=0.1 done 1/5 4 accuracy=0.5", "train.lr=0.9 failed - -"]


def test_elsewhere_there_is_a_line_a_round(capsys):
    with live_sweep(Output(), SweepProgress([SLOW], [1])) as watching:
        watching.on_begin(SLOW)
        watching.on_engine(SLOW, "loop", "it was asked for")
        watching.on_round(SLOW, OUTCOME)
        watching.on_end(done())
    first, second = capsys.readouterr().out.splitlines()
    assert first == "train.lr=0.1: engine loop: it was asked for"
    assert second.startswith("train.lr=0.1: round 1/1: 8 admitted")


def test_a_terminal_is_updated(monkeypatch, capsys):
    monkeypatch.setattr(module.sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: True)
    with live_sweep(Output(), SweepProgress([SLOW], [1])) as watching:
        watching.on_begin(SLOW)
        watching.on_round(SLOW, OUTCOME)
        watching.on_end(done())
    assert "train.lr=0.1" in capsys.readouterr().err


def test_the_best_value_of_each_metric_is_marked(capsys):
    other = dataclasses.replace(SLOW, settings={"train.lr": 0.3})
    better = VariantResult(variant=other, rounds=[OUTCOME], result=dataclasses.replace(result(), final=BETTER))
    swept = SweepResult(variants=[done(), better, FAILED])
    compare(swept, Output())
    _, first, second, _, what, _ = capsys.readouterr().out.splitlines()
    assert ("0.5" in first.split("\t"), "0.75 *" in second.split("\t")) == (True, True)
    assert what == "* the best value of a metric"
    assert swept.as_json()["best"] == {"accuracy": "train.lr=0.3"}


def test_the_comparison_has_every_metric_and_why_one_failed(capsys):
    compare(SweepResult(variants=[done(virtual_seconds=90.0), FAILED]), Output())
    head, first, second, reason = capsys.readouterr().out.splitlines()
    assert head.split("\t") == [
        "variant", "", "rounds", "accuracy", "clients/s", "moved", "seconds", "virtual seconds",
    ]  # fmt: skip
    assert first.split("\t") == ["train.lr=0.1", "done", "1", "0.5", "4", "1.5 MB", "4.0", "90"]
    assert second.split("\t") == ["train.lr=0.9", "failed", "0", "-", "-", "0 B", "-", "-"]
    assert reason.startswith("train.lr=0.9: round 1: no updates")
    assert len(reason) < 450
