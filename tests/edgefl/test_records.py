"""Records: frozen, and the round as the public JSON shows it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from edgefl import records
from edgefl.errors import ProtocolError
from edgefl.records import RegionRound, RoundOutcome, RoundReport, clients_by_rounds, count_clients, no_counts
from edgefl.testing import make_update

OUTCOME = RoundOutcome(
    job="job",
    round=2,
    parameters={"w": np.zeros(1, np.float32)},
    admitted=("a", "b"),
    rejected={"c": "NaN"},
    failed={"d": "no data"},
    missing=("e",),
    weight=3.0,
    metrics={"loss": 0.5},
    seconds=1.5,
    up_bytes=8,
    down_bytes=16,
)


def test_the_public_json_by_hand() -> None:
    assert OUTCOME.report().as_json() == {
        "round": 2,
        "admitted": 2,
        "rejected": 1,
        "failed": 1,
        "missing": 1,
        "reasons": {"c": "NaN", "d": "no data"},
        "seconds": 1.5,
        "up_bytes": 8,
        "down_bytes": 16,
        "metrics": {"loss": 0.5},
    }
    said = OUTCOME.report().as_json()
    assert RoundReport.from_json(json.loads(json.dumps(said)) | {"more": 1}) == OUTCOME.report()


def test_what_only_some_rounds_have_is_left_out_and_what_all_have_must_be_there() -> None:
    said = dataclasses.replace(OUTCOME.report(), model="ab", virtual_end_s=0.0).as_json()
    assert (said["model"], said["virtual_end_s"], "frozen" in said) == ("ab", 0.0, False)
    with pytest.raises(ProtocolError, match=r"not a round.*seconds"):
        RoundReport.from_json({key: value for key, value in said.items() if key != "seconds"})


def test_a_round_with_regions_says_who_answered_where() -> None:
    oslo = RegionRound(parent="cloud", admitted=("a",), failures={"c": "NaN"}, seconds=1.0, up_bytes=3, down_bytes=4)
    report = dataclasses.replace(OUTCOME, regions={"oslo": oslo}).report()
    said = json.loads(json.dumps(report.as_json()))
    assert said["regions"]["oslo"] == dataclasses.asdict(oslo) | {"admitted": ["a"]}
    assert said["regions"]["cloud"] == {
        "parent": "", "admitted": ["b"], "failures": {"d": "no data"}, "seconds": 1.5, "up_bytes": 8, "down_bytes": 16,
    }  # fmt: skip
    assert RoundReport.from_json(said) == report
    twice = oslo + RegionRound(parent="cloud", admitted=("e",), seconds=3.0, up_bytes=1)
    assert (twice.admitted, twice.seconds, twice.up_bytes, twice.down_bytes) == (("a", "e"), 3.0, 4, 4)


def test_the_counts_by_hand() -> None:
    assert OUTCOME.report().counts_text() == "2 admitted, 1 rejected, 1 failed, 1 missing"


def test_an_update_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_update("a", w=[1.0]).weight = 2.0


@pytest.mark.parametrize("kind", [records.Plan, records.Update, records.Failure, records.Partial, records.Traffic])
def test_every_record_is_frozen_and_named(kind: type) -> None:
    assert kind.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(kind))


def test_participation_by_hand():
    counts = no_counts(5)
    count_clients(counts, iter([0, 3]))
    count_clients(counts, [3])
    count_clients(counts, [])
    assert counts.tolist() == [1, 0, 0, 2, 0]
    assert clients_by_rounds(counts) == {"0": 3, "1": 1, "2": 1}


def test_a_million_clients_are_four_megabytes_and_few_lines():
    counts = no_counts(10**6)
    count_clients(counts, range(100))
    assert counts.nbytes == 4_000_000
    assert clients_by_rounds(counts) == {"0": 999_900, "1": 100}
