"""The work of `edgefl offload plan`: measure, choose, attack, tell."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgefl.errors import ConfigError
from edgefl.models.compress import parse_max_drop
from edgefl.offload.graph import ModelGraph, read_graph
from edgefl.offload.leak import Leak
from edgefl.offload.plans.agreement import batches
from edgefl.offload.plans.link import LinkSpeed, parse_link
from edgefl.offload.plans.planner import ALL_CLOUD, ALL_DEVICE, PlanLimits, Prediction
from edgefl.offload.plans.planning import OffloadPlan, Planner, Wish
from edgefl.offload.plans.timing import (
    LayerTimes,
    device_times,
    is_factor,
    machine_name,
    measure_layers,
    times_of_profile,
)
from edgefl.offload.source import ModelSource, task_inputs
from edgefl.offload.wire import FORMATS
from edgefl.operator.connection import CloudConnection
from edgefl.protocols.inference.placement import DEVICE
from edgefl.terminal.output import Output, refuse_no_folder
from edgefl.trees import Tree

MAX_SAMPLES = 256
_SIZE = re.compile(r"(\d+(?:\.\d+)?)(B|kB|KB|MB|GB|KiB|MiB|GiB)")
_BYTES = {"B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_TIME = re.compile(r"(\d+(?:\.\d+)?)(ms|s)")
_MS = {"ms": 1.0, "s": 1e3}


@dataclass(frozen=True, kw_only=True)
class PlanFlags:
    """The options of `edgefl offload plan`, as they were typed."""

    device: str
    link: str
    memory: str | None
    objective: str
    within: str | None
    may_leave: str
    formats: tuple[str, ...]
    max_drop: str
    samples: Path | None
    leak: bool
    measure_all: bool
    plot: Path | None

    def check(self) -> None:
        """Raise ConfigError, before the work, for what cannot be used."""
        _ = self.wish
        parse_max_drop(self.max_drop)
        refuse_no_folder(self.plot, "--plot")
        if self.plot is not None:
            from edgefl.simulation.screen.plot import refuse_unknown_format

            refuse_unknown_format(self.plot)

    @property
    def speed(self) -> LinkSpeed:
        return parse_link(self.link)

    @property
    def wish(self) -> Wish:
        memory = math.inf if self.memory is None else _parsed("--memory", self.memory, _SIZE, _BYTES, "64MB")
        latency = (
            math.inf if self.within is None else _parsed("--within", self.within, _TIME, {"ms": 1, "s": 1e3}, "100ms")
        )
        limits = PlanLimits(memory_bytes=memory, may_leave=self.may_leave, latency_ms=latency)
        return Wish(link=self.speed, objective=self.objective, limits=limits, max_drop=self.max_drop,
                    formats=self.formats or FORMATS, measures_all=self.measure_all)  # fmt: skip


def make_plan(source: ModelSource, request: PlanFlags, connection: CloudConnection, output: Output) -> None:
    """Plan, and tell the result to people and programs."""
    own = own_samples(source, request.samples)
    if request.leak and not own:
        raise ConfigError("--leak attacks your own samples: give --samples FILE.npz, or name a task with data")
    graph = read_graph(source.path)
    here = measure_layers(graph, source.feeds, machine_name())
    device = _device(source, request.device, here, graph, connection)
    planner = Planner(graph, source, here, device)
    output.line(f"{source.who}: {sum(here.layers_ms):.3g} ms here, {sum(device.layers_ms):.3g} ms on {device.machine}")
    found = planner.plan(request.wish, batches(own) if own else ())
    leaks = planner.leaks(own) if request.leak else {}
    cuts = found.best_of_each_cut(request.objective)
    _tell(found, cuts, leaks, request, output)
    if request.plot is not None:
        from edgefl.simulation.screen.offload_plot import write_offload_plot

        title = f"{source.who}, device {request.device}, {request.link}, {request.objective}"
        predicted = {
            one.option.num_head: found.predicted_ms[one.option.num_head, one.option.form]
            for one in cuts
            if one.option.num_head in found.measured
        }
        write_offload_plot(cuts, found.chosen, predicted, leaks, title, request.plot)
        output.line(f"plot: {request.plot}")
    output.result(_as_json(source, found, leaks, request))


def _device(
    source: ModelSource, text: str, here: LayerTimes, graph: ModelGraph, connection: CloudConnection
) -> LayerTimes:  # fmt: skip
    """Return the times of a factor, of a file, or of an enrolled device, which has measured what it serves."""
    if is_factor(text) or Path(text).exists() or Path(text).suffix == ".json":
        return device_times(text, here, graph)
    with connection.open() as client:
        found = next((one for one in client.devices() if one["name"] == text), None)
    if found is None:
        raise ConfigError(
            f"--device {text}: there is no such file, and no device of this name; give a factor such as 5x, a file of "
            "`edgefl offload profile`, or a name of `edgefl devices list`"
        )
    report = ((found.get("telemetry") or {}).get("models") or {}).get(source.name)
    if report is None or report["version"] != source.version:
        serves = "does not serve it now" if report is None else f"serves version {report['version']} now"
        raise ConfigError(
            f"device {text} has not measured {source.who}: it {serves}. Roll it out to the device, or measure it there "
            "with `edgefl offload profile`"
        )
    heads_ms = {_layers(graph, name): float(ms) for name, ms in report["profile_ms"].items()}
    return times_of_profile(heads_ms, here, f"device {text}")


def _layers(graph: ModelGraph, placement: str) -> int:
    return len(graph.layers) if placement == DEVICE else graph.position_of(placement)


def own_samples(source: ModelSource, samples: Path | None) -> Tree:
    """Return the operator's samples: of a file, else of the task; empty if there are none."""
    if samples is not None:
        from edgefl.models.sample import check_inputs, read_npz
        from edgefl.models.session import open_session
        from edgefl.models.tensors import described

        found = read_npz(samples, "--samples")
        check_inputs(source.who, found, described(source.who, open_session(source.path).get_inputs()))
    elif source.task is not None:
        found = task_inputs(source.task, MAX_SAMPLES)
    else:
        return {}
    return {name: one[:MAX_SAMPLES] for name, one in found.items()}


def _tell(
    found: OffloadPlan, cuts: list[Prediction], leaks: Mapping[int, Leak], request: PlanFlags, output: Output
) -> None:
    rows = [
        (
            "*" if one is found.chosen else "", one.option.name, one.option.form, one.option.up_bytes,
            f"{one.device_ms:.3g}", f"{one.link_ms:.3g}", f"{one.cloud_ms:.3g}", f"{one.latency_ms:.3g}",
            one.option.device_bytes, one.option.leaves, _leak_text(leaks.get(one.option.num_head)),
            found.limits.refusal(one) or ("measured" if one.option.num_head in found.measured else "predicted"),
        )
        for one in cuts
    ]  # fmt: skip
    output.table(
        ("chosen", "cut", "format", "bytes up", "device ms", "link ms", "cloud ms", "ms", "device bytes", "leaves",
         "leak", "how known"),
        rows, "", whole=("cut",), spare=("device bytes", "how known", "leaves"),
    )  # fmt: skip
    for (at, form), judged in found.refused.items():
        name = next(one.option.name for one in found.options if one.option.num_head == at)
        output.line(f"{form} at {name} is refused: {judged.measure} {judged.drop:.3g}, allowed: {request.max_drop}")
    chosen = found.chosen.option
    where = chosen.name if chosen.name == ALL_DEVICE else f"{chosen.name} in {chosen.form}"
    output.line(
        f"chosen for {request.objective}: {where}: {found.chosen.latency_ms:.3g} ms, {found.chosen.per_s:.3g} a second"
    )
    if found.judged is not None:
        output.line(f"the wire format costs: {found.judged.measure} {found.judged.drop:.3g}")
    if chosen.name == ALL_CLOUD:
        output.line("the inputs themselves leave the device")
    elif chosen.form and chosen.num_head not in leaks:
        output.line(f"{chosen.leaves} leave the device; how much can be read from them was not measured: --leak")


def _leak_text(leak: Leak | None) -> str:
    return "" if leak is None else f"{leak.measure} {leak.value:.2f} by {leak.attack} (blind {leak.blind:.2f})"


def _as_json(
    source: ModelSource, found: OffloadPlan, leaks: Mapping[int, Leak], request: PlanFlags
) -> dict[str, object]:  # fmt: skip
    def told(one: Prediction) -> dict[str, object]:
        at, form = one.option.num_head, one.option.form
        leak, refused = leaks.get(at), found.refused.get((at, form))
        return {
            **one.as_json(),
            "measured": at in found.measured,
            "predicted_ms": found.predicted_ms[at, form],
            "refused": found.limits.refusal(one) or (f"{refused.measure} {refused.drop:.3g}" if refused else None),
            "leak": None if leak is None else leak.as_json(),
        }

    judged = found.judged
    return {
        "model": source.who,
        "device": request.device,
        "link": request.link,
        "objective": request.objective,
        "chosen": told(found.chosen)
        | {"measure": judged.measure if judged else None, "drop": judged.drop if judged else None},
        "options": [told(one) for one in found.options],
    }


def _parsed(flag: str, text: str, pattern: re.Pattern[str], units: Mapping[str, float], example: str) -> float:
    match = pattern.fullmatch(text.replace(" ", ""))
    if match is None:
        raise ConfigError(f"{flag} {text!r} is no number with a unit ({', '.join(units)}), such as {example}")
    return float(match[1]) * units[match[2]]
