"""Updates that are made durable together: each has a result of its own."""

from __future__ import annotations

import errno
import math

import numpy as np
import pytest
from blake3 import blake3
from sqlalchemy.exc import OperationalError

from cloud.state.spool import Arrival
from cloud.uploads.receiving import Received
from edgefl.errors import UploadCutOff
from edgefl.protocols import fleet_pb2 as pb
from tests.cloud.dataplane.rounds import small_update

Status = pb.UploadState


def received(plane, device, data=None, **changes):
    data = small_update() if data is None else data
    fields = {"size": len(data), "blake3": blake3(data).hexdigest(), "weight": 2.0} | changes
    header = pb.UploadHeader(key=pb.UpdateKey(job=plane.job, round=1), **fields)
    arrival = Arrival(plane.spool, plane.job, 1, device, 0)
    arrival.last = memoryview(data)
    return Received(arrival, header, plane.round, device)


@pytest.fixture
def commits(plane, monkeypatch):
    """The answers of each commit."""
    seen, record = [], plane.jobs.record

    def recorded(job, number, *answers):
        seen.append([one.device for one in answers])
        record(job, number, *answers)

    monkeypatch.setattr(plane.jobs, "record", recorded)
    return seen


def finish(plane, *several):
    return plane.service._updates._finish(several)


def test_several_updates_of_a_round_are_one_commit_and_yielded_in_its_order(plane, commits):
    results = finish(plane, received(plane, "a"), received(plane, "b", small_update(2.0)))
    assert [one.status for one in results] == [Status.STORED, Status.STORED]
    assert commits == [["a", "b"]]
    answers = [plane.next_answer(), plane.next_answer()]
    assert [one.device for one in answers] == ["a", "b"]
    assert plane.jobs.open_round(plane.job, 1, ()) == answers
    for one, value in zip(answers, (1.0, 2.0), strict=True):  # both are in one file
        np.testing.assert_array_equal(plane.spool.tree(one.file)["w"], np.full(1000, value, np.float32))
    assert len({one.file.partition(":")[0] for one in answers}) == 1


def test_a_bad_one_and_one_that_nobody_waits_for_do_not_harm_the_others(plane, commits):
    bad, stranger = received(plane, "a", blake3="0" * 64), received(plane, "c")
    results = finish(plane, bad, stranger, received(plane, "b"))
    assert [one.status for one in results] == [Status.REFUSED, Status.STALE, Status.STORED]
    assert commits == [["a"], ["b"]]
    assert not plane.round.waiting()


def test_one_that_is_not_complete_keeps_what_came(plane):
    data = small_update()
    half = received(plane, "a", data[:1000], size=len(data), blake3=blake3(data).hexdigest())
    results = finish(plane, half, received(plane, "b"))
    assert [(one.status, one.offset) for one in results] == [(Status.PARTIAL, 1000), (Status.STORED, len(data))]
    assert plane.spool.received_bytes(plane.job, 1, "a") == 1000


def test_the_newer_one_of_a_device_cuts_off_the_older(plane, commits):
    older, newer = received(plane, "a"), received(plane, "a")
    results = finish(plane, older, newer)
    assert isinstance(results[0], UploadCutOff)
    assert results[1].status == Status.STORED
    assert commits == [["a"]]


def test_a_database_that_is_busy_refuses_all_and_they_may_come_again(plane, monkeypatch):
    record, faults = plane.jobs.record, [OperationalError("", {}, Exception("busy"))]

    def recorded(*given):
        if faults:
            raise faults.pop()
        record(*given)

    monkeypatch.setattr(plane.jobs, "record", recorded)
    several = [received(plane, one) for one in "ab"]
    assert all(isinstance(one, OperationalError) for one in finish(plane, *several))
    assert plane.round.waiting() == {"a", "b"}
    assert plane.jobs.open_round(plane.job, 1, ()) == []
    assert [one.status for one in finish(plane, *(received(plane, one) for one in "ab"))] == [Status.STORED] * 2


def test_what_is_tried_again_while_the_database_is_busy_does_not_fill_the_disk(plane, monkeypatch):
    def busy(*_given):
        raise OperationalError("", {}, Exception("busy"))

    with monkeypatch.context() as patch:
        patch.setattr(plane.jobs, "record", busy)
        for _ in range(5):
            assert all(isinstance(one, OperationalError) for one in finish(plane, received(plane, "a")))
    assert files_of(plane) == []


def test_a_commit_that_failed_and_is_durable_all_the_same_keeps_its_file(plane, monkeypatch):
    record = plane.jobs.record

    def broken(*given):
        record(*given)
        raise OperationalError("", {}, Exception("disk I/O error"))

    monkeypatch.setattr(plane.jobs, "record", broken)
    finish(plane, received(plane, "a"))
    [answer] = plane.jobs.open_round(plane.job, 1, ())  # as after a restart
    assert plane.spool.tree(answer.file)["w"].shape == (1000,)


def test_updates_of_a_round_that_is_over_leave_nothing(plane):
    late = received(plane, "a")
    plane.round.close()
    plane.spool.drop_round(plane.job, 1)
    assert [one.status for one in finish(plane, late)] == [Status.STALE]
    assert files_of(plane) == []


def test_a_resumed_upload_is_finished_alone(plane):
    """The bytes before its offset are read again, which takes long for a large one."""
    assert received(plane, "a").is_small
    assert not received(plane, "a", size=5_000_000).is_small
    assert not received(plane, "a", offset=500).is_small


def test_a_refused_update_does_not_end_a_pause_of_the_disk(plane):
    storage = plane.service._deps.storage
    assert storage.refused(OSError(errno.ENOSPC, "no space"))
    storage._looked_s = math.inf  # it is not tried meanwhile
    finish(plane, received(plane, "a", blake3="0" * 64))
    assert storage._waits_for
    finish(plane, received(plane, "b"))
    assert not storage._waits_for


def files_of(plane):
    """Return the files of the job in the spool."""
    return [path for path in plane.spool.path(plane.job).rglob("*") if path.is_file()]
