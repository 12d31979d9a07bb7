"""What is learnt of each device from its part in a job's rounds; the same in the cloud and in a simulation.

Invariant: it depends on the outcomes of the rounds alone, so a job that continues after a restart chooses as before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from edgefl.choosing.facts import Value
from edgefl.records import RoundOutcome


@dataclass(frozen=True, kw_only=True, slots=True)
class Participation:
    """One device's part in the rounds of a job so far."""

    samples: float | None = None  # weight of its last update; None = not known
    loss: float | None = None  # `train_loss` of its last update
    duration_s: float | None = None  # of its last update, since the round's start
    rounds: int = 0  # with an admitted update
    asked: int = 0  # rounds in whose cohort it was
    last_round: int = 0  # of its last admitted update
    failures: int = 0  # rounds in a row without an admitted update


UNKNOWN = Participation()


class History:
    """The participations of a job's devices."""

    def __init__(self, known: Mapping[str, Participation] | None = None) -> None:
        self._known = dict(known or {})

    def of(self, device: str) -> Participation:
        """Return one device's participation."""
        return self._known.get(device, UNKNOWN)

    def facts(self, device: str, round_number: int) -> dict[str, Value | None]:
        """Return one device's fields for a select expression in this round."""
        one = self.of(device)
        return {
            "samples": one.samples, "loss": one.loss, "duration_s": one.duration_s, "failures": float(one.failures),
            "staleness": float(round_number - 1 - one.last_round), "rounds": float(one.rounds),
        }  # fmt: skip

    def note(self, outcome: RoundOutcome) -> dict[str, Participation]:
        """Take in a round's outcome; return the participations that it changed."""
        admitted = set(outcome.admitted)
        changed = {}
        for device in outcome.cohort():
            before, seen = self.of(device), outcome.seen.get(device)
            after = dataclasses.replace(before, asked=before.asked + 1, failures=before.failures + 1)
            if device in admitted:
                after = dataclasses.replace(
                    after, failures=0, rounds=before.rounds + 1, last_round=outcome.round,
                    samples=before.samples if seen is None else seen.weight,
                    loss=before.loss if seen is None or seen.loss is None else seen.loss,
                    duration_s=before.duration_s if seen is None or seen.seconds is None else seen.seconds,
                )  # fmt: skip
            changed[device] = after
        self._known |= changed
        return changed

    def as_json(self) -> dict[str, list[Any]]:
        """Return it as JSON: for each device, the values of `Participation` in order."""
        return {device: as_row(one) for device, one in self._known.items()}

    @classmethod
    def from_json(cls, said: Mapping[str, Iterable[Any]]) -> History:
        """Read the result of `as_json`."""
        return cls({device: from_row(row) for device, row in said.items()})


def as_row(one: Participation) -> list[Any]:
    """Return a participation's values in order."""
    return [getattr(one, field.name) for field in dataclasses.fields(Participation)]


def from_row(row: Iterable[Any]) -> Participation:
    """Read the result of `as_row`."""
    names = [field.name for field in dataclasses.fields(Participation)]
    return Participation(**dict(zip(names, row, strict=False)))
