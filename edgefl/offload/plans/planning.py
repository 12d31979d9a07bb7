"""A plan for one model: the options with their sizes and times, measured on this machine, and what is chosen of them.

The scan predicts from each layer's time. What it says of the best few is then measured: their stages are made, compared
with the whole model (parity), and timed, and the wire format is judged. So the choice rests on what was run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgefl.models.session import new_session
from edgefl.offload import wire
from edgefl.offload.cuts import ModelCut, all_tensors, distinct_bytes, find_cuts, save, with_outputs
from edgefl.offload.graph import ModelGraph
from edgefl.offload.leak import Leak, leak_of
from edgefl.offload.plans.agreement import Judged, WireGate, batches
from edgefl.offload.plans.link import LinkSpeed
from edgefl.offload.plans.memory import head_bytes
from edgefl.offload.plans.planner import (
    ACTIVATIONS,
    ALL_CLOUD,
    ALL_DEVICE,
    INPUTS,
    NOTHING,
    OBJECTIVES,
    PlanLimits,
    Prediction,
    SplitOption,
    predict,
    ranked,
)  # fmt: skip
from edgefl.offload.plans.timing import REPEATS, LayerTimes, median_ms
from edgefl.offload.source import ModelSource
from edgefl.offload.stages import SplitModel, check_parity, split_model
from edgefl.trees import Array, Tree

MEASURED = 5  # options whose stages are made and timed
_CODEC_REPEATS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """What a plan is asked for."""

    link: LinkSpeed
    objective: str = "latency"
    limits: PlanLimits = field(default_factory=PlanLimits)
    max_drop: float | str = 0.02
    formats: Sequence[str] = wire.FORMATS
    measures_all: bool = False  # times the stages of every cut, not of the best few


@dataclass(frozen=True, kw_only=True, slots=True)
class OffloadPlan:
    """What was chosen, and of what."""

    chosen: Prediction
    judged: Judged | None  # None if nothing crosses
    options: Sequence[Prediction]  # all, in the order of the cuts; of those that were measured, the measured times
    measured: frozenset[int]  # layers on the device of the options that were measured
    refused: Mapping[tuple[int, str], Judged]  # by layers on the device and format: what the gate refused
    limits: PlanLimits
    predicted_ms: Mapping[tuple[int, str], float]  # by layers on the device and format: latency by the layers' times
    leaks: Mapping[int, Leak] = field(default_factory=dict)  # by layers on the device

    def best_of_each_cut(self, objective: str) -> list[Prediction]:
        """Return each cut's best option that the gate has not refused, in the order of the cuts."""
        key, found = OBJECTIVES[objective], dict[int, Prediction]()
        for one in self.options:
            at = one.option.num_head
            if (at, one.option.form) in self.refused:
                continue
            if at not in found or (key(one), one.latency_ms) < (key(found[at]), found[at].latency_ms):
                found[at] = one
        chosen = self.chosen.option.num_head
        return [self.chosen if at == chosen else one for at, one in sorted(found.items())]


class Planner:
    """Plans for one model on one pair of machines; links and wishes may differ from call to call."""

    def __init__(self, graph: ModelGraph, source: ModelSource, here: LayerTimes, device: LayerTimes) -> None:
        """`here` are the layers' times on this machine, which stands for the cloud; `device` are the device's."""
        self.graph, self.source, self._here, self._device = graph, source, here, device
        self._values = all_tensors(graph, source.feeds)
        self.cuts = find_cuts(graph, self._values)
        self._memory = head_bytes(graph, _bytes_of(self._values), [0, *distinct_bytes(graph, graph.needs)])
        self._stages_ms: dict[int, tuple[float, float]] = {}  # measured: head and tail here
        self.options = list(self._options())

    @property
    def slowdown(self) -> float:
        """How many times slower than this machine the device runs the whole model."""
        return sum(self._device.layers_ms) / sum(self._here.layers_ms)

    def predictions(self, link: LinkSpeed) -> list[Prediction]:
        """Return what every option costs, by the layers' times."""
        return predict(
            self.options, self._device.layers_ms, self._here.layers_ms, link, encoding_factor=self.slowdown
        )  # fmt: skip

    def plan(self, wish: Wish, samples: Sequence[Tree] = ()) -> OffloadPlan:
        """Return the best option that keeps the limits and passes the gate.

        Raises ConfigError if there is none, ParityError for a cut whose stages compute something else.
        """
        predicted = [one for one in self.predictions(wish.link) if one.option.form in {"", *wish.formats}]
        refused: dict[tuple[int, str], Judged] = {}
        gate = WireGate(self.source, wish.max_drop, samples)
        with tempfile.TemporaryDirectory(prefix="edgefl-plan-") as folder:
            stages = _Stages(self, Path(folder))
            known = {
                (one.option.num_head, one.option.form): self._measured(one, stages)
                if wish.measures_all or one.option.num_head in self._stages_ms
                else one
                for one in predicted
            }
            while True:
                allowed = [one for key, one in known.items() if key not in refused]
                best = ranked(allowed, wish.objective, wish.limits)
                if unmeasured := self._unmeasured(best):
                    known |= {key: self._measured(one, stages) for key, one in known.items() if key[0] in unmeasured}
                    continue
                at, form = best[0].option.num_head, best[0].option.form
                judged = gate.judge(stages.of(at), form) if form else None
                if judged is not None and not judged.accepted and form != wire.FORMATS[0]:
                    refused[at, form] = judged
                    continue
                stages.check(at)
                return OffloadPlan(
                    chosen=best[0], judged=judged, options=list(known.values()),
                    measured=frozenset(self._stages_ms), refused=refused, limits=wish.limits,
                    predicted_ms={(one.option.num_head, one.option.form): one.latency_ms for one in predicted},
                )  # fmt: skip

    def leaks(self, inputs: Tree, told: Callable[[ModelCut], None] = lambda _: None) -> dict[int, Leak]:
        """Attack every cut with samples; return what leaks by layers on the device; `told` is called first."""
        found = {}
        for cut in self.cuts:
            told(cut)
            names = [one.name for one in cut.tensors]
            copies = {one: inputs[one] for one in names if one in inputs}
            crossing = copies | self._tensors([one for one in names if one not in copies], inputs)
            found[cut.num_head] = leak_of(self.graph, crossing, inputs)
        return found

    def _unmeasured(self, best: Sequence[Prediction]) -> set[int]:
        """Return the cuts to measure: none if the best is, else those of the best few that are not."""
        first = list(dict.fromkeys(one.option.num_head for one in best))
        if first[0] in self._stages_ms:
            return set()
        return set(first[:MEASURED]) - self._stages_ms.keys()

    def _measured(self, one: Prediction, stages: _Stages) -> Prediction:
        """Return an option's cost with its stages' own times; the device's as many times longer as for its layers."""
        at = one.option.num_head
        if at not in self._stages_ms:
            self._stages_ms[at] = stages.of(at).time_ms(self.source.feeds)
        head_ms, tail_ms = self._stages_ms[at]
        here = sum(self._here.layers_ms[:at])
        factor = sum(self._device.layers_ms[:at]) / here if here else self.slowdown
        return replace(
            one,
            device_ms=head_ms * factor + one.option.encode_ms * self.slowdown,
            cloud_ms=tail_ms + one.option.decode_ms,
        )

    def _options(self) -> Iterator[SplitOption]:
        graph, num = self.graph, len(self.graph.layers)
        read = {name for layer in graph.layers for name in layer.reads}
        yield from self._formats(ALL_CLOUD, 0, [name for name in graph.inputs if name in read], INPUTS)
        for cut in self.cuts:
            names = [one.name for one in cut.tensors]
            yield from self._formats(cut.name, cut.num_head, names, INPUTS if cut.sends_inputs else ACTIVATIONS)
        yield SplitOption(
            name=ALL_DEVICE, num_head=num, form="", up_bytes=0, down_bytes=0, encode_ms=0.0, decode_ms=0.0,
            device_bytes=self._memory[num], leaves=NOTHING,
        )  # fmt: skip

    def _formats(self, name: str, at: int, names: Sequence[str], leaves: str) -> Iterator[SplitOption]:
        tensors: dict[str, Array] = {one: self._values[one] for one in names}
        known = set(self.graph.head_outputs(at))
        outputs = {one: self._values[one] for one in self.graph.outputs if one not in known and one in self._values}
        down = len(wire.encode(outputs, wire.FORMATS[0])) if outputs else 0
        for form, up in wire.sizes(tensors).items():
            if form != wire.FORMATS[0] and all(one.dtype.kind != "f" for one in tensors.values()):
                continue  # integers are sent as they are in every format
            message = wire.encode(tensors, form)
            yield SplitOption(
                name=name, num_head=at, form=form, up_bytes=up, down_bytes=down,
                encode_ms=median_ms(lambda form=form: wire.encode(tensors, form), _CODEC_REPEATS),  # type: ignore[misc]  # the form now
                decode_ms=median_ms(lambda message=message: wire.decode(message), _CODEC_REPEATS),  # type: ignore[misc]
                device_bytes=self._memory[at], leaves=leaves,
            )  # fmt: skip

    def _tensors(self, names: Sequence[str], inputs: Tree) -> dict[str, Array]:
        """Return tensors of the model for all samples, computed in batches."""
        if not names:
            return {}
        with tempfile.TemporaryDirectory(prefix="edgefl-leak-") as folder:
            path = Path(folder) / "some.onnx"
            save(with_outputs(self.graph, names), path, external=self.graph.has_external_data)
            session = new_session(path)
        taken = {one.name for one in session.get_inputs()}
        parts = [
            session.run(list(names), {name: one for name, one in feeds.items() if name in taken})
            for feeds in batches(inputs)
        ]
        return {
            name: np.concatenate([part[at] for part in parts]) if np.ndim(parts[0][at]) else parts[0][at]
            for at, name in enumerate(names)
        }


class _Stages:
    """The stages that were made for a plan, by layers on the device."""

    def __init__(self, planner: Planner, folder: Path) -> None:
        self._planner, self._folder = planner, folder
        self._cuts = {cut.num_head: cut for cut in planner.cuts}
        self._made: dict[int, _WholeModel | _Split] = {}

    def of(self, at: int) -> _WholeModel | _Split:
        if at not in self._made:
            if (cut := self._cuts.get(at)) is None:
                self._made[at] = _WholeModel(self._planner.graph, in_cloud=at == 0)
            else:
                own = self._folder / str(at)
                own.mkdir()
                self._made[at] = _Split(SplitModel(split_model(self._planner.graph, cut, own)))
        return self._made[at]

    def check(self, at: int) -> None:
        """Raise ParityError if the stages of a cut compute something else than the whole model."""
        if isinstance(made := self.of(at), _Split):
            check_parity(self._planner.graph, made.model, self._planner.source.cases, self._cuts[at])


class _Split:
    def __init__(self, model: SplitModel) -> None:
        self.model = model

    def run(self, feeds: Tree, transport: Any = None, /) -> Mapping[str, Array]:
        return self.model.run(feeds, transport)

    def time_ms(self, feeds: Tree) -> tuple[float, float]:
        """Return the median times of the head and the tail here."""
        crossing, _ = self.model.head(feeds)
        self.model.tail(crossing)
        return (
            median_ms(lambda: self.model.head(feeds), REPEATS),
            median_ms(lambda: self.model.tail(crossing), REPEATS),
        )


class _WholeModel:
    """The model on one side: in the cloud, its inputs cross."""

    def __init__(self, graph: ModelGraph, *, in_cloud: bool) -> None:
        self._session, self._in_cloud = new_session(graph.path), in_cloud
        self._names = [one.name for one in self._session.get_outputs()]

    def run(self, feeds: Tree, transport: Any = None, /) -> Mapping[str, Array]:
        given = transport(feeds) if transport is not None else feeds
        return dict(zip(self._names, self._session.run(None, dict(given)), strict=True))

    def time_ms(self, feeds: Tree) -> tuple[float, float]:
        self.run(feeds)
        whole_ms = median_ms(lambda: self.run(feeds), REPEATS)
        return (0.0, whole_ms) if self._in_cloud else (whole_ms, 0.0)


def _bytes_of(values: Mapping[str, Any]) -> dict[str, int]:
    """Return the bytes of tensors; of a sequence, those of its elements."""
    return {
        name: sum(np.asarray(part).nbytes for part in one) if isinstance(one, list) else np.asarray(one).nbytes
        for name, one in values.items()
    }
