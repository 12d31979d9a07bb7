"""Publish a model that devices share with a stage server: its heads, its fall-back and how it is placed, as a release.

Invariant: each cut of the release was split and compared with the whole model, each wire format passed the gate, and
each file was tried as a device will try it, before anything is uploaded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgefl.errors import ConfigError, ProtocolError
from edgefl.models.packing import packed
from edgefl.models.session import new_session, run_errors
from edgefl.models.tensors import described
from edgefl.offload.cuts import ModelCut
from edgefl.offload.graph import ModelGraph, read_graph
from edgefl.offload.plans.agreement import WireGate, batches
from edgefl.offload.plans.planner import OBJECTIVES, SplitOption
from edgefl.offload.plans.planning import Planner
from edgefl.offload.plans.timing import LayerTimes, machine_name, measure_layers
from edgefl.offload.source import ModelSource
from edgefl.offload.stages import SplitModel, StageFiles, check_parity, split_model
from edgefl.offload.wire import FORMATS
from edgefl.operator.client import CloudClient, Json
from edgefl.operator.run import upload_file
from edgefl.protocols.inference.placement import (
    AUTO,
    CLOUD,
    DEVICE,
    FALLBACK,
    Fallback,
    ModelPart,
    Offload,
    Placement,
    head_name,
    split_address,
)
from edgefl.protocols.manifest import check_model_name
from edgefl.protocols.messages import BlobRef

if TYPE_CHECKING:
    from edgefl.models.acceptance import Accepted
    from edgefl.trees import Tree

_CLOSE = 1e-4  # relative: rows that are computed together and apart


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacingRequest:
    """What is published beside the model."""

    name: str
    cuts: Sequence[str] = ()
    whole_on: Sequence[str] = ()  # device, cloud: the whole model there is a placement, too
    use: str = ""  # a placement, or auto; empty = the only one, else auto
    form: str = AUTO  # of what crosses; auto = the smallest that passes the gate
    max_drop: float | str = 0.02
    samples: Tree = field(default_factory=dict)  # the operator's own, for the gate
    fallback: Path | None = None
    fallback_release: str = ""  # NAME:VERSION that it is
    threshold: float = 0.0
    stages: Sequence[str] = ()
    objective: str = "latency"
    timeout_ms: float = 1000.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    new_signature: bool = False

    def __post_init__(self) -> None:
        check_model_name(self.name)
        if not self.cuts and CLOUD not in self.whole_on:
            raise ConfigError("name a cut, --cut split:NODE; `edgefl offload cuts` lists them")
        if self.threshold and self.fallback is None:
            raise ConfigError("--cascade needs a small model that answers the easy samples: --fallback")
        if self.form not in {AUTO, *FORMATS}:
            raise ConfigError(f"--format {self.form!r} is not one of: {', '.join((AUTO, *FORMATS))}")
        for one in self.stages:
            try:
                split_address(one)
            except ProtocolError as cause:
                raise ConfigError(f"--stages: {cause}") from cause
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"--objective {self.objective!r} is not one of: {', '.join(OBJECTIVES)}")


@dataclass(frozen=True, slots=True)
class PlacedFiles:
    """A model with everything that is published of it; its files are in a folder of the caller."""

    file: Path
    accepted: Accepted
    parts: Mapping[str, tuple[Path, Path]]  # by name: the model's file and its sample
    offload: Offload  # with the digests of the parts


def make_placed(source: ModelSource, request: PlacingRequest, folder: Path) -> PlacedFiles:
    """Split, compare, judge and try everything; raises ConfigError, ParityError."""
    from edgefl.models.acceptance import accept

    file = packed(source.path, folder)
    if file.parent != folder:
        file = Path(shutil.copyfile(file, folder / file.name))
    source = dataclasses.replace(source, path=file)
    graph = read_graph(file)
    here = measure_layers(graph, source.feeds, machine_name())
    planner = Planner(graph, source, here, here)
    placer = _Placer(source, request, graph, planner, folder)
    placements = [*placer.placements(here)]
    whole = accept(file, folder / "whole.sample", source.cases)
    parts = {DEVICE: (file, whole.sample)} | placer.heads
    fallback = None
    if request.fallback is not None:
        behind = placer.check_fallback(request.fallback, whole, placements)
        given = packed(request.fallback, folder)
        cases = source.cases if not behind else []
        parts[FALLBACK] = given, accept(given, folder / "fallback.sample", cases).sample
        fallback = Fallback(part=_part(*parts[FALLBACK]), behind=behind, release=request.fallback_release)
    offload = Offload(
        use=request.use or (AUTO if len(placements) > 1 else placements[0].name),
        placements=[_with_head(one, parts) for one in placements], stages=request.stages, fallback=fallback,
        threshold=request.threshold, objective=request.objective, timeout_ms=request.timeout_ms,
        divides=_divides(file, source.cases),
    )  # fmt: skip
    if not any(one.name == DEVICE for one in placements):
        del parts[DEVICE]
    return PlacedFiles(file, whole, parts, offload)


def publish_placed(client: CloudClient, placed: PlacedFiles, request: PlacingRequest) -> Json:
    """Upload and sign; return the release. Raises SignatureChanged."""
    for file, sample in placed.parts.values():
        upload_file(client, file)
        upload_file(client, sample)
    whole = placed.accepted
    return client.publish(
        request.name, upload_file(client, placed.file), request.metrics, sample=upload_file(client, whole.sample),
        inputs=dict(whole.inputs), outputs=dict(whole.outputs), new_signature=request.new_signature,
        offload=dataclasses.asdict(placed.offload),
    )  # fmt: skip


class _Placer:
    """Makes the placements of one model."""

    def __init__(
        self, source: ModelSource, request: PlacingRequest, graph: ModelGraph, planner: Planner, folder: Path
    ) -> None:
        self._source, self._request, self._graph, self._planner = source, request, graph, planner
        self._folder = folder
        self._gate = WireGate(source, request.max_drop, batches(request.samples) if request.samples else ())
        self._cuts = {cut.num_head: cut for cut in planner.cuts}
        self._crossing: dict[str, tuple[str, ...]] = {}  # by placement
        self.heads: dict[str, tuple[Path, Path]] = {}

    def placements(self, here: LayerTimes) -> Iterator[Placement]:
        """Yield each placement, in the order of the layers; heads are written on the way."""
        positions = sorted({self._graph.position_of(one) for one in self._request.cuts})
        if CLOUD in self._request.whole_on:
            yield self._placement(CLOUD, self._judged(0, _InCloud(self._graph)), here)
        for at in positions:
            if (cut := self._cuts.get(at)) is None:
                raise ConfigError(f"{self._source.who} has no cut behind layer {at}: what crosses cannot be sent")
            files = self._split(cut)
            model = SplitModel(files)
            check_parity(self._graph, model, self._source.cases, cut)
            self._crossing[cut.name] = files.crossing
            self._accept_head(files, at)
            yield self._placement(cut.name, self._judged(at, model), here)
        if DEVICE in self._request.whole_on:
            yield self._placement(DEVICE, self._options(len(self._graph.layers))[0], here)

    def check_fallback(self, path: Path, whole: Accepted, placements: Sequence[Placement]) -> str:
        """Return the placement behind whose head the fall-back begins; empty if it takes the model's inputs.

        Raises ConfigError unless it returns what the model does.
        """
        session = new_session(packed(path, self._folder))
        inputs, outputs = (described(path.name, side) for side in (session.get_inputs(), session.get_outputs()))
        if {one.name: one.type_text for one in outputs} != dict(whole.outputs):
            raise ConfigError(
                f"the fall-back {path.name} returns {', '.join(map(str, outputs))}; expected the model's own outputs: "
                f"{', '.join(f'{name} {text}' for name, text in whole.outputs.items())}"
            )
        if {one.name: one.type_text for one in inputs} == dict(whole.inputs):
            return ""
        names = {one.name for one in inputs}
        for one in placements:
            if names <= {*self._crossing.get(one.name, ())}:
                return one.name
        raise ConfigError(
            f"the fall-back {path.name} takes {', '.join(map(str, inputs))}; expected the model's inputs, or what "
            "crosses at one of its cuts"
        )

    def _split(self, cut: ModelCut) -> StageFiles:
        own = self._folder / f"cut-{cut.num_head}"
        own.mkdir()
        return split_model(self._graph, cut, own)

    def _accept_head(self, files: StageFiles, at: int) -> None:
        from edgefl.models.acceptance import accept

        names = {one.name for one in new_session(files.head).get_inputs()}
        cases = [{name: one for name, one in case.items() if name in names} for case in self._source.cases]
        sample = self._folder / f"{head_name(at)}.sample"
        self.heads[head_name(at)] = packed(files.head, self._folder), accept(files.head, sample, cases).sample

    def _options(self, at: int) -> list[SplitOption]:
        """Return the options at a cut, the smallest first."""
        return sorted((one for one in self._planner.options if one.num_head == at), key=lambda one: one.up_bytes)

    def _judged(self, at: int, model: SplitModel | _InCloud) -> SplitOption:
        """Return the smallest option at a cut that passes the gate; raises ConfigError if there is none."""
        wanted = set(FORMATS) if self._request.form == AUTO else {self._request.form}
        refused = []
        for one in self._options(at):
            if one.form not in wanted:
                continue
            judged = self._gate.judge(model, one.form)
            if judged.accepted or (one.form == FORMATS[0] and self._request.form == AUTO):
                return one
            refused.append(f"{one.form}: {judged.measure} {judged.drop:.3g}")
        raise ConfigError(
            f"no wire format at the cut behind layer {at} is allowed ({'; '.join(refused) or 'it has none of those'}; "
            f"--max-drop {self._request.max_drop}). Allow more, or choose --format fp32 or another cut"
        )

    def _placement(self, name: str, option: SplitOption, here: LayerTimes) -> Placement:
        at = option.num_head
        crossing = self._crossing.get(name, self._inputs() if name == CLOUD else ())
        return Placement(
            name=name, layers=at, crossing=list(crossing), form=option.form,
            device_ms=sum(here.layers_ms[:at]), cloud_ms=sum(here.layers_ms[at:]), encode_ms=option.encode_ms,
            decode_ms=option.decode_ms, up_bytes=option.up_bytes, down_bytes=option.down_bytes,
            device_bytes=option.device_bytes, leaves=option.leaves,
        )  # fmt: skip

    def _inputs(self) -> tuple[str, ...]:
        read = {name for layer in self._graph.layers for name in layer.reads}
        return tuple(name for name in self._graph.inputs if name in read)


class _InCloud:
    """The whole model behind a link, for the gate."""

    def __init__(self, graph: ModelGraph) -> None:
        self._session = new_session(graph.path)
        self._names = [one.name for one in self._session.get_outputs()]

    def run(self, feeds: Tree, transport: object = None, /) -> Tree:
        given = transport(feeds) if callable(transport) else feeds
        return dict(zip(self._names, self._session.run(None, dict(given)), strict=True))


def _with_head(placement: Placement, parts: Mapping[str, tuple[Path, Path]]) -> Placement:
    """Return a placement with the digests of the file that the device runs."""
    files = parts.get(DEVICE if placement.name == DEVICE else head_name(placement.layers))
    return placement if files is None or placement.name == CLOUD else dataclasses.replace(placement, head=_part(*files))


def _part(file: Path, sample: Path) -> ModelPart:
    return ModelPart(blob=_blob_of(file), sample=_blob_of(sample))


def _blob_of(path: Path) -> BlobRef:
    with path.open("rb") as file:
        return BlobRef(sha256=hashlib.file_digest(file, "sha256").hexdigest(), size=path.stat().st_size)


def _divides(path: Path, cases: Sequence[Tree]) -> bool:
    """Whether a model computes several rows as it does each alone, as far as its sample shows."""
    session = new_session(path)
    infos = [*described(path.name, session.get_inputs()), *described(path.name, session.get_outputs())]
    feeds = cases[-1]
    counts = {len(one) for one in feeds.values() if one.ndim}
    if any(one.shape[:1] != (-1,) for one in infos) or len(counts) != 1 or counts <= {0, 1}:
        return False
    (count,) = counts
    try:
        whole = session.run(None, dict(feeds))
        alone = [session.run(None, {name: one[at : at + 1] for name, one in feeds.items()}) for at in range(count)]
    except run_errors():
        return False
    apart = [np.concatenate(rows) for rows in zip(*alone, strict=True)]
    return all(
        one.shape == other.shape and np.allclose(one, other, rtol=_CLOSE, atol=_CLOSE)
        for one, other in zip(whole, apart, strict=True)
    )


def placements_text(offload: Offload) -> list[str]:
    """Return one line for each placement of a release, for people."""
    return [
        f"{one.name}: {one.layers} layers on the device"
        + (f", {one.up_bytes} bytes in {one.form} cross ({one.leaves})" if one.form else "")
        for one in offload.placements
    ]
