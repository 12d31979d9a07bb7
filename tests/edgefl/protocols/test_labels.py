"""Names of jobs: which are refused, and which jobs a word means."""

from __future__ import annotations

import pytest

from edgefl.errors import ConfigError
from edgefl.protocols.labels import MAX_LABEL_CHARS, check_label, meant_by

JOBS = [
    {"id": "job-1a2b", "label": "first try"},
    {"id": "job-1a77", "label": "ab12"},
    {"id": "job-ab12", "label": None},
    {"id": "relay-9f00"},
]


@pytest.mark.parametrize("label", ["", " a", "a ", "x" * (MAX_LABEL_CHARS + 1), "a\nb", "job-1", "relay-x"])
def test_a_name_that_cannot_be_shown_or_looks_like_an_id_is_refused(label: str) -> None:
    with pytest.raises(ConfigError, match="--name"):
        check_label(label)


@pytest.mark.parametrize("label", [None, "a", "first try, lr 0.1", "\u5b66\u7fd2", "x" * MAX_LABEL_CHARS])
def test_any_other_name_is_accepted(label: str | None) -> None:
    check_label(label)


@pytest.mark.parametrize(
    ("word", "ids"),
    [
        ("job-1a2b", ["job-1a2b"]),
        ("job-1a", ["job-1a2b", "job-1a77"]),
        ("1a7", ["job-1a77"]),
        ("9f", ["relay-9f00"]),
        ("first try", ["job-1a2b"]),
        ("first", []),
        ("ab12", ["job-1a77", "job-ab12"]),  # the name of one, the begin of another's id
        ("job-ab12", ["job-ab12"]),
        ("", []),
    ],
)
def test_a_job_is_meant_by_its_id_its_beginning_or_its_name(word: str, ids: list[str]) -> None:
    assert [one["id"] for one in meant_by(word, JOBS)] == ids


def test_an_id_means_that_job_although_it_begins_others() -> None:
    assert [one["id"] for one in meant_by("job-1", [{"id": "job-1"}, {"id": "job-12"}])] == ["job-1"]
