"""Sequences by a table: limits of a device and of all, leases, and that another device's id is an unknown one."""

from __future__ import annotations

import pytest

from cloud.generation.sessions import ORPHAN_S, SessionLimits, TailSequences
from cloud.stages.work import RequestRefused


def sessions(**limits):
    return TailSequences(SessionLimits(**{"context": 100, "token_bytes": 10, "cache_bytes": 4000} | limits))


def test_a_sequence_reserves_its_most_tokens_until_it_ends() -> None:
    all_ = sessions()
    one = all_.start("a", "s", 50, 0.0)
    assert (all_.reserved_bytes, len(all_)) == (500, 1)
    assert all_.find("a", "s", 1.0) is one
    all_.end(one)
    assert (all_.reserved_bytes, len(all_)) == (0, 0)
    with pytest.raises(RequestRefused, match="is not here") as refused:
        all_.find("a", "s", 1.0)
    assert refused.value.status == "ABORTED"


def test_another_device_s_sequence_is_an_unknown_one() -> None:
    all_ = sessions()
    mine = all_.start("a", "s", 10, 0.0)
    with pytest.raises(RequestRefused, match="'s' of device b is not here"):
        all_.find("b", "s", 0.0)
    other = all_.start("b", "s", 10, 0.0)
    assert other.key != mine.key
    assert all_.find("a", "s", 0.0) is mine


def test_a_start_of_the_same_name_replaces_the_former() -> None:
    all_ = sessions(of_device=1)
    first = all_.start("a", "s", 100, 0.0)
    second = all_.start("a", "s", 100, 0.0)
    assert (all_.get("a", "s"), len(all_), all_.reserved_bytes) == (second, 1, 1000)
    all_.end(first)  # no effect
    assert len(all_) == 1


def test_limits_of_a_device_and_of_all() -> None:
    all_ = sessions(of_device=2)
    all_.start("a", "1", 10, 0.0)
    all_.start("a", "2", 10, 0.0)
    for device, name, num, words in (
        ("a", "3", 10, "device a has 2 sequences here, the most that it may have"),
        ("b", "1", 101, "may get 101 tokens; the context has 100"),
    ):
        with pytest.raises(RequestRefused, match=words):
            all_.start(device, name, num, 0.0)
    few = sessions(total=1)
    few.start("a", "1", 10, 0.0)
    with pytest.raises(RequestRefused, match="there are 1 sequences here, the most of all devices"):
        few.start("b", "1", 10, 0.0)


def test_one_device_has_half_of_the_cache_and_all_have_all_of_it() -> None:
    all_ = sessions()
    for number in range(2):
        all_.start("a", str(number), 100, 0.0)  # 2 x 1000 of 4000 bytes
    with pytest.raises(RequestRefused, match="device a may have 1 KiB, of which 1 KiB are taken") as refused:
        all_.start("a", "3", 1, 0.0)
    assert refused.value.status == "RESOURCE_EXHAUSTED"
    all_.start("b", "1", 100, 0.0)
    all_.start("c", "1", 100, 0.0)
    with pytest.raises(RequestRefused, match="all devices may have 3 KiB"):
        all_.start("d", "1", 1, 0.0)
    assert all_.reserved_bytes == 4000


def test_leases_end_but_not_under_a_computation() -> None:
    all_ = sessions(lease_s=5.0)
    idle, busy = all_.start("a", "1", 10, 0.0), all_.start("a", "2", 10, 0.0)
    busy.is_busy = True
    assert all_.take_expired(5.0) == []
    assert all_.take_expired(5.1) == [idle]
    all_.find("a", "2", 4.0)
    assert busy.due_s == 9.0
    with pytest.raises(RequestRefused, match="its lease of 5 s is over"):
        all_.find("a", "2", 20.0)


def test_a_device_without_a_stream_keeps_its_sequences_for_a_moment() -> None:
    all_ = sessions(lease_s=60.0)
    mine, other = all_.start("a", "1", 10, 0.0), all_.start("b", "1", 10, 0.0)
    all_.orphan("a", 1.0)
    assert (mine.due_s, other.due_s) == (1.0 + ORPHAN_S, 60.0)
