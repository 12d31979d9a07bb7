"""The end of a log: whole records, bounds, one job's lines, and no secrets."""

from __future__ import annotations

import pytest

from edgefl.process.log_tail import HIDDEN, of_job, read_tail, without_secrets


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "agent.log"
    path.with_name("agent.log.1").write_text("first job=job-1\n")
    path.write_text("second job=job-12\nthird job=job-1 round=2\n    Traceback:\n      deep\nfourth\n")
    return path


def test_the_last_records_are_whole_and_go_back_into_the_file_before(log):
    assert read_tail(log, 2).lines == ["third job=job-1 round=2", "    Traceback:", "      deep", "fourth"]
    assert read_tail(log, 2).cut
    everything = read_tail(log, 9)
    assert (everything.lines[0], len(everything.lines), everything.cut) == ("first job=job-1", 6, False)


def test_one_job_has_its_lines_and_their_traces(log):
    found = read_tail(log, 9, of_job("job-1"))
    assert found.lines == ["first job=job-1", "third job=job-1 round=2", "    Traceback:", "      deep"]
    assert read_tail(log, 9, of_job("job-2")).lines == []
    assert of_job("relay-1")("x relay.started relay=relay-1")


def test_what_is_new_since_an_end_also_over_a_rotation(log):
    def write(text):
        with log.open("a") as file:
            file.write(text)

    end = read_tail(log, 2).end
    assert (read_tail(log, 9, after=end).lines, read_tail(log, 9, after=end).end) == ([], end)
    write("fifth\nhalf a l")
    found = read_tail(log, 9, after=end)
    assert found.lines == ["fifth"]
    write("ine\n    deep\n")
    log.rename(log.with_name("agent.log.1"))
    write("sixth\n")
    found = read_tail(log, 9, after=found.end)
    assert found.lines == ["half a line", "    deep", "sixth"]
    assert read_tail(log, 9, after=found.end).lines == []
    log.write_text("new\n")  # shorter than what had been read of a file with this number
    assert read_tail(log, 9, after=f"{log.stat().st_ino}:5000").lines[-1] == "new"


def test_no_more_bytes_than_allowed(tmp_path):
    path = tmp_path / "agent.log"
    path.write_text("".join(f"line {number:4}\n" for number in range(1000)))
    found = read_tail(path, 10_000, max_bytes=100)
    assert (found.lines, found.cut) == ([f"line {number:4}" for number in range(990, 1000)], True)
    path.write_text("head\n" + "    deep\n" * 1000)
    assert read_tail(path, 10, max_bytes=100).cut
    assert read_tail(tmp_path / "none.log", 10).lines == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("token efl1.Ab-_9.0123abcd used", f"token {HIDDEN} used"),
        ("Authorization: Bearer abc.DEF-1=", f"Authorization: Bearer {HIDDEN}"),
        ("-----BEGIN PRIVATE KEY-----\nMC4\n-----END PRIVATE KEY-----\nx", f"{HIDDEN}\nx"),
        ("-----BEGIN EC PRIVATE KEY-----\nMC4", HIDDEN),
        ("bearer of news, efl1", "bearer of news, efl1"),
    ],
)
def test_what_looks_like_a_secret_is_hidden(text, shown):
    assert without_secrets(text) == shown
