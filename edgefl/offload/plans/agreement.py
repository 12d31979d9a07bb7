"""What a wire format costs a split model: by the task's own gate, or by how far the outputs on samples agree.

With a task that has test data, its metric judges, as it judges a compressed model (`edgefl.models.gate`). Otherwise the
drop is the share of decisions (the index of the largest score) that change; for outputs that are no scores, and where
there are fewer than 50 decisions, the difference of the outputs relative to their size (L2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edgefl.errors import NotMeasurable, ProtocolError
from edgefl.models.compress import parse_max_drop
from edgefl.models.session import open_session
from edgefl.offload import wire
from edgefl.trees import Array, Tree

if TYPE_CHECKING:
    from edgefl.models.gate import Gate
    from edgefl.offload.source import ModelSource

FEW_DECISIONS = 50
_ROUNDING = 1e-9


class RunsSplit(Protocol):
    """A model that is run in two stages."""

    def run(self, feeds: Tree, transport: Any = None, /) -> Mapping[str, Array]:
        """Return the outputs by name."""


@dataclass(frozen=True, slots=True)
class Judged:
    """What a gate saw."""

    measure: str
    drop: float
    accepted: bool


class WireGate:
    """Judges wire formats; raises ConfigError for a limit that is no fraction."""

    def __init__(self, source: ModelSource, max_drop: float | str, samples: Sequence[Tree] = ()) -> None:
        """`samples` are inputs in batches; without them the release's sample is used."""
        self._max_drop, relative = parse_max_drop(max_drop)
        self._samples = list(samples) or source.cases
        self._session = open_session(source.path)
        self._names = [one.name for one in self._session.get_outputs()]
        self._whole: list[dict[str, Array]] = []
        self.gate = _gate_of(source, relative=relative)
        self.judged_by = f"the task's {self.gate.measure.name}" if self.gate else "agreement of outputs on samples"

    def judge(self, model: RunsSplit, form: str) -> Judged:
        """Run a split model with its tensors in this format. What the format cannot hold is not accepted."""
        try:
            if self.gate is not None:
                return self._by_task(self.gate, model, form)
            return self._by_agreement(model, form)
        except ProtocolError:
            return Judged("does not fit", 1.0, accepted=False)

    def _by_task(self, gate: Gate, model: RunsSplit, form: str) -> Judged:
        name = gate.measure.name
        before = gate.evaluate(_Whole(self._session))[name]
        after = gate.evaluate(_Through(self._session, model, form))[name]
        drop = gate.measure.drop(before, after)
        return Judged(name, drop, accepted=drop <= self._max_drop + _ROUNDING)

    def _by_agreement(self, model: RunsSplit, form: str) -> Judged:
        if not self._whole:
            for feeds in self._samples:
                found = self._session.run(None, dict(feeds))
                self._whole.append(dict(zip(self._names, map(np.asarray, found), strict=True)))
        seen = [model.run(feeds, lambda tensors: wire.through(tensors, form)) for feeds in self._samples]
        judged = [
            _difference([one[name] for one in self._whole], [np.asarray(one[name]) for one in seen])
            for name in self._names
        ]
        measure, drop = max(judged, key=lambda one: one[1])
        return Judged(measure, drop, accepted=drop <= self._max_drop + _ROUNDING)


class _Whole:
    """The whole model, as a session."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def get_inputs(self) -> list[Any]:
        found: list[Any] = self._session.get_inputs()
        return found

    def run(self, _names: None, feeds: Mapping[str, Array]) -> list[Array]:
        found: list[Array] = self._session.run(None, dict(feeds))
        return found


class _Through(_Whole):
    """A split model with a wire format between its stages, as a session."""

    def __init__(self, session: Any, model: RunsSplit, form: str) -> None:
        super().__init__(session)
        self._model, self._form = model, form

    def run(self, _names: None, feeds: Mapping[str, Array]) -> list[Array]:
        found = self._model.run(feeds, lambda tensors: wire.through(tensors, self._form))
        return [found[one.name] for one in self._session.get_outputs()]


def _gate_of(source: ModelSource, *, relative: bool) -> Gate | None:
    """Return the task's own gate; None without a task, or if it cannot judge: no test data, or nothing learned."""
    if source.task is None:
        return None
    from edgefl.models.gate import gate_of

    try:
        return gate_of(source.task, source.path, relative=relative)
    except NotMeasurable:
        return None


def _difference(whole: Sequence[Array], seen: Sequence[Array]) -> tuple[str, float]:
    """Return how one output differs in all cases, and by what."""
    first = whole[0]
    if first.dtype.kind != "f":
        wrong = sum(int((one != other).sum()) for one, other in zip(whole, seen, strict=True))
        return "other values", wrong / max(1, sum(one.size for one in whole))
    axis = 1 if first.ndim >= 4 else first.ndim - 1
    decisions = sum(one.size // one.shape[axis] for one in whole) if first.ndim >= 2 and first.shape[axis] > 1 else 0
    if decisions >= FEW_DECISIONS:
        pairs = zip(whole, seen, strict=True)
        wrong = sum(int((one.argmax(axis) != other.argmax(axis)).sum()) for one, other in pairs)
        return "other decisions", wrong / decisions
    error = sum(float(np.square(one.astype(np.float64) - other).sum()) for one, other in zip(whole, seen, strict=True))
    size = sum(float(np.square(one.astype(np.float64)).sum()) for one in whole)
    return "relative error", float(np.sqrt(error / size)) if size else float(error > 0)


def batches(inputs: Tree, rows: int = 32) -> list[Tree]:
    """Return a file's inputs in batches, by their first dimension; one batch if that differs among them."""
    counts = {len(one) for one in inputs.values() if one.ndim}
    if len(counts) != 1 or any(one.ndim == 0 for one in inputs.values()):
        return [inputs]
    (count,) = counts
    return [{name: one[at : at + rows] for name, one in inputs.items()} for at in range(0, count, rows)]
