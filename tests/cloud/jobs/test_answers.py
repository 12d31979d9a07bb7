"""What is stored of an answer."""

from __future__ import annotations

from cloud.jobs.answers import AnswerRow
from edgefl.records import DeviceEvaluation


def test_a_late_answer_is_stored_as_that_of_the_round_before() -> None:
    answer = AnswerRow(device="cam", file="f", weight=2.0, late=True)
    row = answer.of_round("job", 3)
    assert (row["job"], row["round"], row["device"], row["file"], row["weight"]) == ("job", 2, "cam", "f", 2.0)
    assert "late" not in row
    assert AnswerRow(device="cam", reason="no data").of_round("job", 3)["round"] == 3


def test_an_evaluation_is_stored_as_json() -> None:
    evaluated = DeviceEvaluation(metrics={"accuracy": 0.5}, weight=4.0)
    row = AnswerRow(device="cam", evaluation=evaluated).of_round("job", 1)
    assert row["evaluation"]["metrics"] == {"accuracy": 0.5}
