"""What a strategy said of its rounds: a Result of `Strategy.start`, or the legacy server's History."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flwr.app import ArrayRecord

from edgefl.flower.inside import History, Result, Returned
from edgefl.flower.watch import merged

ByRound = dict[int, dict[str, float]]


def metrics_of(heard: Iterable[Returned]) -> ByRound:
    """Return the metrics of each round; of several results, the later one's count."""
    rounds: ByRound = {}
    for one in heard:
        server, evaluate, train = _of_result(one) if isinstance(one, Result) else _of_history(one)
        for number in sorted({*server, *evaluate, *train}):
            rounds[number] = merged(server.get(number, {}), evaluate.get(number, {}), train.get(number, {}))
    return rounds


def arrays_of(heard: Sequence[Returned]) -> ArrayRecord | None:
    """Return the last arrays that a strategy returned; none where only a legacy server ran."""
    return next((one.arrays for one in reversed(heard) if isinstance(one, Result)), None)


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
    """Leave out what is no single number: lists, texts, bytes."""
    return {name: float(value) for name, value in record.items() if isinstance(value, (int, float))}
