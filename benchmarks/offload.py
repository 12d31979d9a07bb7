"""The planner's choice against every cut: four models, five links, and what each cut really takes.

Each cut in each wire format is run: a session for the head and one for the tail, the message encoded and decoded. The
device is slower than this machine by a factor, and the link is a pause. So all options are compared by their measured
parts; then the chosen option and the best one run as whole requests, in turn, with pauses for the slower device and for
the bytes on the link. The planner knows only its own measurements. Quick runs take three models and every third cut.
A ratio is the best option's time over the chosen one's: 1.0 = nothing is faster.
Then split models are served by real processes over a real link: see `benchmarks.offload_served`.

    python -m benchmarks.offload [--quick] [--json F]
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import offload_models, offload_served
from benchmarks.report import Row, Target, command
from edgefl.models.session import new_session
from edgefl.offload import wire
from edgefl.offload.graph import ModelGraph, read_graph
from edgefl.offload.plans.link import LinkSpeed
from edgefl.offload.plans.planner import ALL_CLOUD, ALL_DEVICE, SplitOption
from edgefl.offload.plans.planning import Planner, Wish
from edgefl.offload.plans.timing import machine_name, measure_layers, median_ms
from edgefl.offload.source import ModelSource, source_of_file
from edgefl.offload.stages import SplitModel, split_model
from edgefl.trees import Tree

LINKS_MBPS, RTT_MS, SLOWER = (1, 5, 20, 50, 100), 10.0, 5.0
ALLOWED = 1.05  # of the best measured option
REPEATS, QUICK_REPEATS, QUICK_STEP = 9, 3, 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """The measured parts of one request with an option, in milliseconds; the link's follow from its bytes."""

    option: SplitOption
    head_ms: float
    encode_ms: float
    decode_ms: float
    tail_ms: float
    up_bytes: int
    down_bytes: int

    def total_ms(self, link: LinkSpeed) -> float:
        """Return what the request takes over a link."""
        way = link.upload_ms(self.up_bytes) + link.download_ms(self.down_bytes) + link.rtt_ms
        return SLOWER * (self.head_ms + self.encode_ms) + self.decode_ms + self.tail_ms + (
            way if self.option.form else 0.0
        )  # fmt: skip


def measure(*, quick: bool) -> Iterator[Row]:
    """Yield a row for each model and link, then those on real processes."""
    with tempfile.TemporaryDirectory(prefix="edgefl-offload-") as name:
        for model in offload_models.MODELS if quick else (*offload_models.MODELS, offload_models.LARGE):
            folder = Path(name) / model
            folder.mkdir()
            offload_models.export(model, folder / "model.onnx")
            yield from _rows(model, folder, quick=quick)
    yield from offload_served.measure(quick=quick)


def _rows(model: str, folder: Path, *, quick: bool) -> Iterator[Row]:
    source = source_of_file(folder / "model.onnx")
    graph = read_graph(source.path)
    repeats = QUICK_REPEATS if quick else REPEATS
    here = measure_layers(graph, source.feeds, machine_name())
    planner = Planner(graph, source, here, here.scaled(SLOWER, f"{SLOWER:g}x"))
    links = [LinkSpeed(up_mbps=mbps, down_mbps=mbps, rtt_ms=RTT_MS) for mbps in LINKS_MBPS]
    plans = [planner.plan(Wish(link=link, max_drop=1.0)).chosen for link in links]
    planned = {one.option.num_head for one in plans}
    options = [one for one in planner.options if not quick or one.num_head in planned or one.num_head % QUICK_STEP == 0]
    runs = {at: Stages(planner, source, graph, at, folder) for at in sorted({one.num_head for one in options})}
    parts = [runs[one.num_head].parts(one, repeats) for one in options]
    for link, plan in zip(links, plans, strict=True):
        best = min(parts, key=lambda one: one.total_ms(link))
        ours = next(one for one in parts if one.option == plan.option)
        times = _in_turn(runs[plan.option.num_head], ours, runs[best.option.num_head], best, link, repeats)
        ends = [one for one in parts if one.option.name in {ALL_CLOUD, ALL_DEVICE} and one.option.form in {"", "fp32"}]
        yield Row(
            workload=f"{model}, {link.up_mbps:g} Mbit/s, {RTT_MS:g} ms, device {SLOWER:g}x slower",
            metric=f"planned: {_name(plan.option)}",
            unit="ms",
            ours=times[0],
            rival=f"best of {len(parts)} options: {_name(best.option)}",
            theirs=times[1],
            targets=(Target(of="ratio", at_least=1 / ALLOWED),),
            detail={
                "predicted_ms": plan.latency_ms, "parts_ms": ours.total_ms(link), "best_parts_ms": best.total_ms(link),
                **{one.option.name: one.total_ms(link) for one in ends},
            },
        )  # fmt: skip


class Stages:
    """The stages of one cut, open; or the whole model on one side."""

    def __init__(self, planner: Planner, source: ModelSource, graph: ModelGraph, at: int, folder: Path) -> None:
        self._feeds, self._at = source.feeds, at
        cut = next((one for one in planner.cuts if one.num_head == at), None)
        self._split = None if cut is None else SplitModel(split_model(graph, cut, folder))
        self._whole = new_session(source.path) if cut is None else None
        self._names = graph.outputs

    def head(self) -> Tree:
        """Run the device's side, and return what crosses: nothing, if all is on the device."""
        if self._split is not None:
            return self._split.head(self._feeds)[0]
        if self._at:
            self._run_whole(self._feeds)
            return {}
        return self._feeds

    def tail(self, crossing: Tree) -> Tree:
        """Run the cloud's side, and return the outputs."""
        if self._split is not None:
            return self._split.tail(crossing)
        return {} if self._at else self._run_whole(crossing)

    def parts(self, option: SplitOption, repeats: int) -> Parts:
        """Measure each part by itself."""
        crossing, message = self.head(), b""
        outputs = self.tail(crossing)
        encode_ms = decode_ms = 0.0
        if option.form:
            message = wire.encode(crossing, option.form)
            encode_ms = _median_ms(lambda: wire.encode(crossing, option.form), repeats)
            decode_ms = _median_ms(lambda: wire.decode(message), repeats)
        return Parts(
            option=option, head_ms=_median_ms(self.head, repeats), encode_ms=encode_ms, decode_ms=decode_ms,
            tail_ms=_median_ms(lambda: self.tail(crossing), repeats), up_bytes=len(message),
            down_bytes=len(wire.encode(outputs, "fp32")) if outputs else 0,
        )  # fmt: skip

    def request_ms(self, option: SplitOption, link: LinkSpeed) -> float:
        """Run one request with real pauses, and return what it took."""
        start_s = time.perf_counter()
        crossing = self.head()
        message = wire.encode(crossing, option.form) if option.form else b""
        time.sleep((SLOWER - 1) * (time.perf_counter() - start_s))  # the device is slower
        if option.form:
            time.sleep((link.upload_ms(len(message)) + link.rtt_ms) / 1e3)
            outputs = self.tail(wire.decode(message))
            answer = wire.encode(outputs, "fp32")
            time.sleep(link.download_ms(len(answer)) / 1e3)
        return 1e3 * (time.perf_counter() - start_s)

    def _run_whole(self, feeds: Tree) -> Tree:
        found = self._whole.run(None, dict(feeds)) if self._whole is not None else ()
        return dict(zip(self._names, found, strict=True))


def _in_turn(ours: Stages, our: Parts, best: Stages, other: Parts, link: LinkSpeed, repeats: int) -> list[float]:
    """Return the medians of whole requests with both options; what is the same option is measured once."""
    found: list[tuple[float, float]] = []
    for _ in range(repeats):
        first = ours.request_ms(our.option, link)
        found.append((first, first if our.option == other.option else best.request_ms(other.option, link)))
    return [statistics.median(one[side] for one in found) for side in range(2)]


def _name(option: SplitOption) -> str:
    return f"{option.name} {option.form}".rstrip()


def _median_ms(call: Callable[[], object], repeats: int) -> float:
    call()
    return median_ms(call, repeats)


if __name__ == "__main__":
    command(measure, __doc__)()
