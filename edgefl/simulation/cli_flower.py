"""`edgefl simulate` of a Flower app: its own ServerApp decides on rounds and strategy, we run its clients."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgefl.errors import ConfigError
from edgefl.operator.output import Output, metrics_text
from edgefl.simulation.live import Progress, live_rounds
from edgefl.simulation.machine import num_cores

ROUNDS_KEY = "num-server-rounds"  # by Flower's convention; an app need not have it


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowerRequest:
    """What was asked of a Flower app."""

    folder: Path
    clients: int | None
    rounds: int | None
    engine: str
    settings: Sequence[str]  # run-config overrides, key=value
    plot: Path | None
    task_flags: Mapping[str, object]  # given, but of no meaning to a Flower app


def simulate_flower(request: FlowerRequest, output: Output) -> None:
    """Run the app, show its rounds, and write what was asked for; raises ConfigError for what it cannot take."""
    if given := [flag for flag, value in request.task_flags.items() if value]:
        raise ConfigError(f"{', '.join(given)}: a Flower app has no such thing; its run-config goes by --set key=value")
    workers = _workers(request.engine)
    from edgefl.flower import load_flower_app, parse_run_config, run_flower_app
    from edgefl.flower.app import fuse_run_config

    overrides = parse_run_config(request.settings)
    if request.rounds is not None:
        overrides[ROUNDS_KEY] = request.rounds
    app = load_flower_app(request.folder)
    count = fuse_run_config(app, overrides).get(ROUNDS_KEY)
    progress = Progress(count if isinstance(count, int) else None)
    progress.begin("flower", now_s=time.perf_counter())
    with live_rounds(output, progress) as on_round:
        result = run_flower_app(app, request.clients, overrides, workers=workers, on_round=on_round)
    said = result.as_json()
    output.line(
        f"{len(result.rounds)} rounds in {result.seconds:.1f} s, {said['clients_per_second']:.0f} clients/s, "
        f"at most {result.peak_rss_mb:.0f} MB: {metrics_text(result.final) or 'no metrics'}"
    )
    if request.plot is not None:
        from edgefl.simulation.plot import write_plot

        write_plot({result.app: result.rounds}, request.plot)
        output.line(f"plot: {request.plot}")
    output.result(said)


def _workers(engine: str) -> int | None:
    """Return how many processes train; None lets the app's runner see for itself."""
    if engine == "stacked":
        raise ConfigError("the engine 'stacked' cannot run a Flower app: its training is its own code; use auto")
    return {"auto": None, "loop": 0, "pool": num_cores()}[engine]
