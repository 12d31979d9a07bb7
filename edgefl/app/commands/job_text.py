"""Text about jobs for people: the page of `edgefl jobs show`, and the tables of `edgefl jobs compare`."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from typing import Any

from edgefl.operator.client import Json
from edgefl.operator.history import changed_settings, curves_of, reasons_of, seconds_of
from edgefl.rounds import LastEvaluation
from edgefl.terminal.curve import curve_text
from edgefl.terminal.output import Output, counted, metrics_text, time_text
from edgefl.terminal.text import one_line

MAX_DEVICES = 3  # named with a reason
CURVE_CHARS, LEAST_CURVE_CHARS = 40, 8
_NUMBER_CHARS = 4 * 11  # four columns of numbers


def progress_text(job: Json, noun: str = "") -> str:
    """Return how far a job is, such as `3/10`."""
    if job["kind"] == "relay":
        return f"{job['answered']}/{job['sent']} messages"
    return f"{job['rounds_done']}/{job['config']['rounds']['count']}{noun}"


def ended_text(job: Json) -> str:
    """Return how and when a job ended."""
    how = {"done": "it was done", "failed": "it failed", "cancelled": "it was cancelled"}[job["state"]]
    why = f" ({job['error']})" if job["state"] == "failed" else ""
    return f"{how} at {time_text(job['ended_s'])}, after {progress_text(job, ' rounds')}{why}"


def print_job(job: Json, output: Output) -> None:
    """Print a job: state, settings, what its clients did, the curve of each metric, the reasons of refusals."""
    label = f" {job['label']!r}" if job.get("label") else ""
    output.line(f"{job['id']}{label} {job['name']}: {job['state']}, {progress_text(job, ' rounds')}")
    if job.get("waiting"):
        output.line(job["waiting"])
    if job["error"]:
        output.line(f"error: {job['error']}")
    if job.get("stopped"):
        output.line(f"stopped early: {job['stopped']}")
    if job.get("continues"):
        output.line(f"continues {job['continues']}")
    seconds = seconds_of(job)
    took = "" if seconds is None else f", took {seconds:.1f} s"
    output.line(f"started {time_text(job['created_s'])}{took}")
    _print_settings(job, output)
    if rounds := job.get("rounds", ()):
        _print_rounds(rounds, output)
    _print_curves(job, output)
    if last := job.get("last_evaluation"):
        _print_last_evaluation(LastEvaluation.from_json(last), output)
    _print_reasons(job, output)
    if "devices" in job:
        output.line("")
        rows = [(one["device"], one["code"], one["reason"]) for one in job["devices"]]
        output.table(("device", "chosen", "why not"), rows, "no device is enrolled", whole=("device", "chosen"))


def _print_last_evaluation(last: LastEvaluation, output: Output) -> None:
    if last.metrics:
        output.line("")
        output.line(f"the last model on devices: {metrics_text(last.metrics)}")
    if last.fault:
        output.line(last.fault)


def _print_settings(job: Json, output: Output) -> None:
    if job["kind"] == "relay":
        return
    changed = changed_settings(job)
    text = " ".join(f"{key}={_value(value)}" for key, value in changed.items())
    lines = f"settings: {text or 'the defaults'}{', others as by default' if text else ''}"
    for line in textwrap.wrap(lines, _width(), subsequent_indent="  ", break_long_words=False, break_on_hyphens=False):
        output.line(line)


def _print_rounds(rounds: list[Json], output: Output) -> None:
    sums = {name: sum(int(one[name]) for one in rounds) for name in ("admitted", "rejected", "failed", "missing")}
    clients = ", ".join(f"{count} {name}" for name, count in sums.items() if count or name == "admitted")
    moved = ", ".join(f"{_bytes(sum(one[f'{way}_bytes'] for one in rounds))} {way}" for way in ("down", "up"))
    mean_s = sum(one["seconds"] for one in rounds) / len(rounds)
    kept = f"rounds {rounds[0]['round']} to {rounds[-1]['round']}" if len(rounds) > 1 else f"round {rounds[0]['round']}"
    output.line(f"{kept}: {clients}; {mean_s:.2f} s per round; {moved}")


def _print_curves(job: Json, output: Output) -> None:
    curves = curves_of(job)
    if not curves:
        return
    names = max(len(one_line(curve.name)) for curve in curves)
    room = min(CURVE_CHARS, max(LEAST_CURVE_CHARS, _width() - names - _NUMBER_CHARS))
    rows = [
        (curve.name, *(f"{value:.4g}" for value in (curve.first, curve.last, curve.lowest, curve.highest)),
         curve_text(curve.values, room, sys.stdout.encoding))
        for curve in curves
    ]  # fmt: skip
    columns = ("metric", "first", "last", "lowest", "highest", "curve")
    output.line("")
    output.table(columns, rows, "", whole=columns)


def _print_reasons(job: Json, output: Output) -> None:
    reasons = reasons_of(job)
    if reasons:
        output.line("")
        output.line("refused or failed:")
    for one in reasons:
        devices = ", ".join(one["devices"][:MAX_DEVICES])
        more = len(one["devices"]) - MAX_DEVICES
        who = f"{devices} and {more} more" if more > 0 else devices
        output.line(f"  {one['count']} times, last in round {one['last_round']} ({who}): {one_line(one['reason'])}")


def print_comparison(result: Json, output: Output) -> None:
    """Print the result of `edgefl.operator.history.compared`: tables with a column per job."""
    ids = [str(one["id"]) for one in result["jobs"]]
    heads = [f"{chr(ord('A') + at)}" if len(ids) <= 26 else str(at + 1) for at in range(len(ids))]
    for head, one in zip(heads, result["jobs"], strict=True):
        output.line(f"{head}: {one['id']}{' ' + repr(one['label']) if one['label'] else ''}")
    output.line("")
    facts = [(name, *(_cell(value) for value in values)) for name, values in result["facts"].items()]
    output.table(("", *heads), facts, "")
    output.line("")
    settings = [(key, *(_cell(value) for value in values)) for key, values in result["settings"].items()]
    output.table(("setting", *heads), settings, "the settings are the same", whole=("setting",))
    output.line("")
    two = len(ids) == 2
    metrics = []
    for name, curves in result["metrics"].items():
        last = [None if curve is None else float(curve["last"]) for curve in curves]
        known = [value for value in last if value is not None]
        difference = [_cell(known[1] - known[0] if len(known) == 2 else None, sign=True)] if two else []
        metrics.append((name, *(_cell(value) for value in last), *difference))
    columns = ("metric, last", *heads, *(["B - A"] if two else []))
    output.table(columns, metrics, "no metrics", whole=("metric, last",))


def _cell(value: Any, *, sign: bool = False) -> str:
    if isinstance(value, float):
        return f"{value:+.4g}" if sign else f"{value:.6g}"
    return "" if value is None else _value(value)


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _bytes(count: int) -> str:
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return counted(count, "byte")


def _width() -> int:
    return shutil.get_terminal_size().columns
