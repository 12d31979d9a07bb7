"""Answers of devices as they are stored, before they are aggregated."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from edgefl.records import DeviceEvaluation


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerRow:
    """One device's answer to an assignment, as stored: a file, or the reason why there is none."""

    device: str
    file: str | None = None  # below the spool's folder
    weight: float = 0.0
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    reason: str | None = None
    evaluation: DeviceEvaluation | None = None
    region: str | None = None  # that sent the answer, within a sum; its file and its number are the sum's
    refused: bool | None = None  # by the guard of its region
    late: bool = False  # it is of the round before, and is stored as that round's

    def of_round(self, job: str, number: int) -> dict[str, Any]:
        """Return the row of an answer that is taken in round `number`."""
        values = dataclasses.asdict(self)
        return {"job": job, "round": number - 1 if values.pop("late") else number} | values
