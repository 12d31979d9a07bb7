"""Split models on real processes, for `benchmarks.offload`: a stage server, a device, and a link of a given speed.

Both are in network namespaces of their own, with mutual TLS; `benchmarks.network` is the link. The device is slower by
a factor (`benchmarks.offload_device`). Rows: `auto` against everything on the device and everything in the cloud;
requests in flight against one at a time. Without namespaces, these rows say so.
One row needs no link: what `PlacedModel` adds to its floor, which is the head, an echo of the same bytes over bare
gRPC, and the tail in ONNX Runtime.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np

from benchmarks import offload_models, stages
from benchmarks.network.machines import Machine, Machines, why_not
from benchmarks.offload_device import SLOWER
from benchmarks.report import Row, Target
from benchmarks.stages_echo import ECHO
from cloud.state.enrolment import Enrolment
from cloud.state.store import open_database
from edge_agent.placement.placed_file import PlacedFile, text_of
from edge_agent.placement.placed_model import PlacedModel, PlacedRelease
from edge_agent.placement.tail_client import TailClient
from edge_agent.sessions import LoadedModel, load
from edgefl.models.session import new_session
from edgefl.models.tensors import described
from edgefl.offload.graph import read_graph
from edgefl.offload.plans.link import LinkSpeed
from edgefl.offload.plans.planning import Planner, Wish
from edgefl.offload.plans.timing import machine_name, measure_layers
from edgefl.offload.source import source_of_file
from edgefl.operator.publishing.placing import PlacingRequest, make_placed
from edgefl.protocols import tls
from edgefl.protocols.inference.placement import AUTO, CLOUD, DEVICE, ModelPart, Offload, Placement
from edgefl.protocols.messages import BlobRef

LINKS_MBPS, RTT_MS = (5, 20), 10.0
PORT = 9450
IN_FLIGHT = 4
NEVER_SLOWER, ONCE_FASTER = 0.95, 1.5  # of the better of both ends


def measure(*, quick: bool) -> Iterator[Row]:
    """Yield the rows."""
    yield _above_floor(200 if quick else 2000)
    if reason := why_not():
        yield Row(workload="split models over a link", metric="auto", unit="ms", skipped=reason)
        return
    best = 0.0
    for model in ("alexnet",) if quick else (*offload_models.MODELS, offload_models.LARGE):
        with _Served(model) as served:
            for mbps in LINKS_MBPS[-1:] if quick else LINKS_MBPS:
                row = served.auto(mbps, 10 if quick else 60)
                best = max(best, row.ratio or 0.0)
                yield row
            yield served.in_flight(LINKS_MBPS[-1], 24 if quick else 120)
    yield Row(
        workload=f"all of these, device {SLOWER:g}x slower", metric="auto against the better end, best case",
        unit="times", ours=best, more_is_better=True, targets=(Target(of="ours", at_least=ONCE_FASTER),),
    )  # fmt: skip


class _Served:
    """One model: a stage server on one machine, a device on the other, and the link between them."""

    def __init__(self, model: str) -> None:
        self._model, self._exit = model, ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            undo.push(self._exit)
            self._folder = Path(self._exit.enter_context(_folder()))
            offload_models.export(self._model, self._folder / "m.onnx")
            self._machines = self._exit.enter_context(Machines(["cloud", "device"]))
            enrol(self._folder)
            cuts = self._place()
            self._exit.enter_context(self._stages(cuts))
            self._device = self._exit.enter_context(self._start_device())
            undo.pop_all()
        return self

    def __exit__(self, *_details: object) -> None:
        self._exit.close()

    def auto(self, mbps: float, requests: int) -> Row:
        """Measure `auto` and both ends, in turn."""
        self._set_link(mbps)
        seen: dict[str, list[float]] = {AUTO: [], DEVICE: [], CLOUD: []}
        chosen: set[str] = set()
        for _ in range(3):
            for placement, times in seen.items():
                found = self._ask(placement=placement, requests=requests // 3 or 1, in_flight=1)
                times.append(found["p50_ms"])
                if placement == AUTO:
                    chosen.add(found["placement"])
        medians = {name: statistics.median(times) for name, times in seen.items()}
        ends = {name: medians[name] for name in (DEVICE, CLOUD)}
        better = min(ends, key=lambda name: ends[name])
        return Row(
            workload=f"{self._model}, {mbps:g} Mbit/s, {RTT_MS:g} ms, device {SLOWER:g}x slower",
            metric=f"auto: {' or '.join(sorted(chosen))}", unit="ms", ours=medians[AUTO],
            rival=f"all in the {better}" if better == CLOUD else "all on the device", theirs=ends[better],
            targets=(Target(of="ratio", at_least=NEVER_SLOWER),), detail={**medians},
        )  # fmt: skip

    def in_flight(self, mbps: float, requests: int) -> Row:
        """Measure the split with several requests in flight, and one at a time."""
        self._set_link(mbps)
        split = self._split
        rates = {n: self._ask(placement=split, requests=requests, in_flight=n)["per_s"] for n in (1, IN_FLIGHT)}
        return Row(
            workload=f"{self._model} at {split}, {mbps:g} Mbit/s", metric=f"{IN_FLIGHT} in flight", unit="requests/s",
            ours=rates[IN_FLIGHT], rival="one at a time", theirs=rates[1], more_is_better=True,
            targets=(Target(of="ratio", at_least=1.7),),
        )  # fmt: skip

    def _place(self) -> list[str]:
        """Make the release: the planner's cuts for these links, and both ends. Return the cuts."""
        source = source_of_file(self._folder / "m.onnx")
        graph = read_graph(source.path)
        here = measure_layers(graph, source.feeds, machine_name())
        planner = Planner(graph, source, here, here.scaled(SLOWER, f"{SLOWER:g}x"))
        ends = {0, len(graph.layers)}
        cuts = []
        for mbps in LINKS_MBPS:
            link = LinkSpeed(up_mbps=mbps, down_mbps=mbps, rtt_ms=RTT_MS)
            ranked = sorted(planner.predictions(link), key=lambda one: one.latency_ms)
            inside = next(one for one in ranked if one.option.num_head not in ends)
            plan = planner.plan(Wish(link=link, max_drop=1.0)).chosen.option
            cuts.append(inside.option.name if plan.num_head in ends else plan.name)
        self._split = cuts[-1]
        own = self._folder / "parts"
        own.mkdir()
        request = PlacingRequest(name="model", cuts=sorted(set(cuts)), whole_on=(DEVICE, CLOUD), max_drop=1.0)
        placed = make_placed(source, request, own)
        device = self._folder / "device"
        for part, (file, sample) in placed.parts.items():
            name = f"head-{len(graph.layers)}" if part == DEVICE else part
            shutil.copyfile(file, device / f"{name}.onnx")
            shutil.copyfile(sample, device / f"{name}.safetensors")
        shutil.copyfile(placed.accepted.sample, device / "sample.safetensors")
        shutil.copyfile(placed.file, self._folder / "model.onnx")
        offload = placed.offload
        text = text_of(
            PlacedFile(
                digest=digest_of(placed.file), placements=[one.name for one in offload.placements],
                offload=_with_stages(offload, f"{self._machines['cloud'].address}:{PORT}"),
                inputs=placed.accepted.inputs, outputs=placed.accepted.outputs,
            )
        )  # fmt: skip
        (device / "placed.json").write_text(text)
        return [one.name for one in offload.placements if one.name.startswith("split:")]

    @contextmanager
    def _stages(self, cuts: list[str]) -> Iterator[None]:
        """Run the stage server for a tail behind each cut, and for the whole model."""
        cloud = self._machines["cloud"]
        options = [part for cut in cuts for part in ("--tail-from", cut)]
        arguments = ["cloud", "stages", self._folder / "model.onnx", "--home", self._folder / "home", "--host",
                     cloud.address, "--port", str(PORT), "--tail-from", CLOUD, *options]  # fmt: skip
        command = cloud.command([sys.executable, "-m", "edgefl", *arguments])
        with stages.running([*map(str, command)], "stages.ready"):
            yield

    @contextmanager
    def _start_device(self) -> Iterator[subprocess.Popen[str]]:
        machine: Machine = self._machines["device"]
        command = machine.command([sys.executable, "-m", "benchmarks.offload_device", self._folder / "device"])
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def _set_link(self, mbps: float) -> None:
        self._machines.set_link("device", mbps=mbps, delay_s=RTT_MS / 2e3)

    def _ask(self, **wish: Any) -> Mapping[str, Any]:
        ours, theirs = self._device.stdin, self._device.stdout
        if ours is None or theirs is None:
            raise RuntimeError("the device has no pipes")
        ours.write(json.dumps(wish) + "\n")
        ours.flush()
        if not (line := theirs.readline()):
            raise RuntimeError(f"the device ended while it measured {wish}")
        found: Mapping[str, Any] = json.loads(line)
        return found


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _with_stages(offload: Offload, address: str) -> Offload:
    return dataclasses.replace(offload, stages=[address], timeout_ms=60_000.0)


def _folder() -> Any:
    return tempfile.TemporaryDirectory(prefix="edgefl-offload-")


def enrol(folder: Path) -> None:
    """Make a cloud's home, and a device that is enrolled there."""
    stages.make_home(folder / "home")
    device = folder / "device"
    device.mkdir()
    shutil.copyfile(folder / "home" / "tls" / "ca.pem", device / "ca.pem")
    engine = open_database(folder / "home" / "cloud.db")
    enrolment = Enrolment(engine, folder / "home" / "tls")
    secret, _ = tls.parse_token(enrolment.new_token())
    identity = tls.Identity.in_folder(device)
    identity.cert.write_bytes(enrolment.enroll(secret, "device", {}, tls.new_request(identity, "device")))
    engine.dispose()


def _above_floor(requests: int) -> Row:
    size = stages.Size(width=256, rows=1, requests=requests)
    with stages.files_of(size) as files, stages.served(files, "--tail-from", stages.BORDER) as port, stages.echo() as e:
        ours, floor = asyncio.run(_compared(files, size, port, e))
    return Row(
        workload=f"PlacedModel, {size.width * 4} bytes at the cut", metric="p50 above the floor", unit="ms",
        ours=ours - floor, targets=(Target(of="ours", at_most=1.0),), detail={"whole_ms": ours, "floor_ms": floor},
    )  # fmt: skip


async def _compared(files: stages.Files, size: stages.Size, port: int, echo: int) -> tuple[float, float]:
    """Return the medians (ms) of a placed model and of its floor, which take turns."""
    head, tail, feeds = load("model", 1, files.folder / "head.onnx"), files.session("tail"), {"x": files.x}
    placement = Placement(name="split:h0", layers=2, crossing=[stages.BORDER], form="fp32", cloud_ms=1.0)
    model = _placed(files, head, placement, port)
    async with stages.channel(echo) as bare:
        call = bare.unary_unary(ECHO)

        async def split() -> None:
            found = await model.infer([model.outputs[0].name], feeds, None, _compute)
            if "fallback_reason" in found.parameters:
                raise RuntimeError(found.parameters["fallback_reason"])

        async def floor() -> None:
            (border,) = head.session.run(None, feeds)
            data = await call(border.tobytes())
            tail.run(None, {stages.BORDER: np.frombuffer(data, np.float32).reshape(border.shape)})  # type: ignore[attr-defined]

        samples: dict[str, list[float]] = {"split": [], "floor": []}
        kinds: Mapping[str, Callable[[], Any]] = {"split": split, "floor": floor}
        for number in range(size.requests):
            for name, once in kinds.items():
                begun_s = time.perf_counter()
                await once()
                if number >= size.requests // 10:
                    samples[name].append((time.perf_counter() - begun_s) * 1e3)
    await model.tail.close()
    return statistics.median(samples["split"]), statistics.median(samples["floor"])


def _placed(files: stages.Files, head: LoadedModel, placement: Placement, port: int) -> PlacedModel:
    whole = new_session(files.folder / "model.onnx")
    part = ModelPart(blob=BlobRef(sha256="0" * 64, size=1), sample=BlobRef(sha256="0" * 64, size=1))
    placement = dataclasses.replace(placement, head=part)
    release = PlacedRelease(
        name="model", version=1, digest=digest_of(files.folder / "model.onnx"),
        inputs=described("model", whole.get_inputs()), outputs=described("model", whole.get_outputs()),
        offload=Offload(use=placement.name, placements=[placement], timeout_ms=60_000.0), candidates=(placement,),
    )  # fmt: skip
    tail = TailClient([f"127.0.0.1:{port}"], None, stages.DEVICES[0])
    return PlacedModel(release, {"head-2": head}, tail, random.Random(0))  # noqa: S311 - jitter


async def _compute(model: LoadedModel, names: Any, feeds: Any) -> list[Any]:
    return model.run(names, feeds)
