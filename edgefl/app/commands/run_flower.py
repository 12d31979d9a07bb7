"""`edgefl run` of a Flower app's folder: its ServerApp runs here, its ClientApps on the devices of a fleet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgefl.app.commands.progress import round_progress
from edgefl.errors import ConfigError
from edgefl.operator.connection import CloudConnection
from edgefl.terminal.output import INTERRUPTED, Output, counted, metrics_text

if TYPE_CHECKING:
    from edgefl.flower import FlowerRunResult

ROUNDS_KEY = "num-server-rounds"  # by Flower's convention; an app need not have it


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowerRun:
    """The request to run a Flower app: folder, settings, output."""

    folder: Path
    rounds: int | None
    settings: Sequence[str]  # run-config overrides, key=value
    run_config: Sequence[str]  # the same in Flower's syntax; `settings` override them
    federation_config: Sequence[str]
    out: Path | None
    label: str | None = None  # the run's name, for `edgefl jobs`
    task_flags: Mapping[str, object]  # given flags that mean nothing for a Flower app


def run_flower(asked: FlowerRun, connection: CloudConnection, output: Output) -> None:
    """Run the app, show its rounds and write the result; raises ConfigError for options that it cannot use."""
    if given := [flag for flag, value in asked.task_flags.items() if value]:
        raise ConfigError(
            f"{', '.join(given)}: not for a Flower app; set its run-config with --set key=value, "
            "or with --run-config FILE.toml"
        )
    if asked.federation_config:
        raise ConfigError(
            "--federation-config: on a fleet the devices that are online are the nodes. Drop it; set a device's "
            "node config with edgefl agent start --data key=value. edgefl simulate has as many nodes as you like"
        )
    from edgefl.flower import load_flower_app, parse_run_config, run_on_fleet
    from edgefl.flower.apps.app import fuse_run_config
    from edgefl.flower.apps.options import read_run_config

    overrides = read_run_config(asked.run_config) | parse_run_config(asked.settings)
    if asked.rounds is not None:
        overrides[ROUNDS_KEY] = asked.rounds
    app = load_flower_app(asked.folder)
    count = fuse_run_config(app, overrides).get(ROUNDS_KEY)

    started = ""

    def on_start(job: str, num_online: int) -> None:
        nonlocal started
        started = job
        waits = "" if num_online else "; Flower's strategies wait for more, Ctrl-C ends that"
        output.line(f"{job} started: {app.name}, {counted(num_online, 'device')} online{waits}")

    try:
        with round_progress(output, count if isinstance(count, int) else None) as screen:
            result = run_on_fleet(
                app, connection.open, overrides, on_start=on_start, on_round=screen.on_round,
                on_waiting=lambda waiting: screen.tell_waiting(started or app.name, waiting), out=asked.out,
                label=asked.label, on_note=output.line,
            )  # fmt: skip
    except KeyboardInterrupt:  # before its ServerApp began, or a second Ctrl-C
        if not started:
            raise
        output.line(f"\ninterrupted; {started} has ended in the cloud, too")
        raise click.exceptions.Exit(INTERRUPTED) from None
    ended = "interrupted" if result.interrupted else "done"
    output.line(f"{result.job} {ended} in {result.seconds:.1f} s: {metrics_text(result.final) or 'no metrics'}")
    if asked.out is not None:
        output.line(model_text(result, asked.out))
    output.result(result.as_json())
    if result.interrupted:
        raise click.exceptions.Exit(INTERRUPTED)


def model_text(result: FlowerRunResult, out: Path) -> str:
    """Return where the model is, or why there is none."""
    if result.model is not None:
        return f"model: {out}"
    return (
        f"no model is written to {out}: no strategy of the app returned one; without a strategy, an app saves its own"
    )
