"""What a strategy reports of its rounds: a Result of `Strategy.start`, or the legacy server's History."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord

from edgefl.errors import ConfigError
from edgefl.flower.internals import History, Result, ResultSource, legacy_arrays
from edgefl.flower.records import tree_of
from edgefl.flower.tracker import merged
from edgefl.trees import write_tree

Json = dict[str, Any]
ByRound = dict[int, dict[str, float]]


def metrics_of(sources: Iterable[ResultSource]) -> ByRound:
    """Return the metrics of each round; if there are several results, the last one wins."""
    rounds: ByRound = {}
    for one in sources:
        if not isinstance(one, (Result, History)):
            continue
        server, evaluate, train = _of_result(one) if isinstance(one, Result) else _of_history(one)
        for number in sorted({*server, *evaluate, *train}):
            rounds[number] = merged(server.get(number, {}), evaluate.get(number, {}), train.get(number, {}))
    return rounds


def arrays_of(sources: Sequence[ResultSource]) -> ArrayRecord | None:
    """Return the last model: from a strategy's Result, a legacy server, or a legacy workflow."""
    models = (_arrays(one) for one in reversed(sources))
    return next((arrays for arrays in models if arrays), None)


def write_arrays(arrays: ArrayRecord, out: Path) -> Json:
    """Write a model as safetensors; returns its digest and path. Raises ConfigError if it cannot be written."""
    try:
        with out.open("wb") as file:
            write_tree(tree_of(arrays), file)
        return {"sha256": hashlib.sha256(out.read_bytes()).hexdigest(), "path": str(out)}
    except OSError as cause:
        raise ConfigError(f"cannot write the model to {out}: {cause.strerror}") from cause


def _arrays(one: ResultSource) -> ArrayRecord | None:
    if isinstance(one, Result):
        return one.arrays
    return None if isinstance(one, History) else legacy_arrays(one)


def _of_result(result: Result) -> tuple[ByRound, ByRound, ByRound]:
    parts = (result.evaluate_metrics_serverapp, result.evaluate_metrics_clientapp, result.train_metrics_clientapp)
    server, evaluate, train = ({number: _numbers(record) for number, record in part.items()} for part in parts)
    return server, evaluate, train


def _of_history(history: History) -> tuple[ByRound, ByRound, ByRound]:
    server = _by_round({"loss": history.losses_centralized, **history.metrics_centralized})
    evaluate = _by_round({"loss": history.losses_distributed, **history.metrics_distributed})
    return server, evaluate, _by_round(history.metrics_distributed_fit)


def _by_round(series: Mapping[str, Sequence[tuple[int, Any]]]) -> ByRound:
    rounds: ByRound = {}
    for name, values in series.items():
        for number, value in values:
            rounds.setdefault(number, {}).update(_numbers({name: value}))
    return rounds


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """Keep only single numbers, not lists, texts or bytes."""
    return {name: float(value) for name, value in record.items() if isinstance(value, (int, float))}
