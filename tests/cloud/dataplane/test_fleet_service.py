"""The data plane over real gRPC and mutual TLS, spoken to by the generated stub."""

import dataclasses
import hashlib
import io
import math
import os
import threading

import grpc
import numpy as np
import pytest
from blake3 import blake3

from cloud.dataplane import fleet_service
from cloud.dataplane.open_round import OpenRound
from edgefl.errors import CloudStopping, CloudUnreachable
from edgefl.exchange import Terms
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols import tls
from edgefl.protocols.assignments import unpack
from edgefl.protocols.messages import ASSIGNMENTS, BlobRef, Deliver
from edgefl.records import DeviceEvaluation
from edgefl.terminal.text import is_safe
from edgefl.trees import write_tree

Status = pb.UploadState

ASK = pb.NextRequest(knows=ASSIGNMENTS)


def update_bytes(value=1.0):
    file = io.BytesIO()
    write_tree({"w": np.full(3_000_000, value, np.float32)}, file)
    return file.getvalue()


def test_next_lists_the_rounds_that_wait_for_the_caller(plane):
    reply = plane.stub("a").Next(ASK, timeout=10)
    assert unpack(reply) == [plane.round.assignment]
    assert reply.broker == "mqtts://:8883"
    assert not plane.stub("c").Next(ASK, timeout=10).assignments


def test_an_assignment_of_a_kind_that_the_agent_does_not_know_fails_with_the_reason(plane):
    message, answers = a_message(plane)
    reply = plane.stub("a").Next(pb.NextRequest(agent_version="0.2", knows=["fit", "fly"]), timeout=10)
    assert unpack(reply) == [plane.round.assignment]
    [answer] = answers
    assert answer.reason.startswith("agent 0.2 does not know assignments of the kind 'deliver'; update the agent")
    assert not message.waits_for("a")
    older = plane.stub("b").Next(pb.NextRequest(agent_version="0.1"), timeout=10)  # it names no kinds yet
    assert not older.assignments
    assert plane.next_answer().reason.startswith("agent 0.1 does not know assignments of the kind 'fit'")


def a_message(plane, number=7, content=b"a message", device="a"):
    """Open a message of a relay; return its round, and the answers that it recorded."""
    source, answers = plane.folder / f"content-{number}", []
    source.write_bytes(content)
    ref = BlobRef(sha256=hashlib.sha256(content).hexdigest(), size=len(content))
    asked = Deliver(
        job="relay-1", round=number, envelope="e", content=ref, content_blake3="00",
        bundle=plane.round.assignment.bundle, deadline_s=60.0, max_update_bytes=1000,
    )  # fmt: skip
    opened = OpenRound(asked, (device,), Terms(deadline_s=600.0, offline_grace_s=5.0))
    opened.source, opened.record = source, answers.append
    plane.rounds.add(opened)
    return opened, answers


def test_a_message_is_downloaded_by_its_device_alone_and_answered_with_any_bytes(plane):
    opened, answers = a_message(plane)
    stub, request = plane.stub("a"), pb.DownloadRequest(sha256=opened.assignment.content.sha256)
    assert b"".join(chunk.data for chunk in stub.Download(request, timeout=10)) == b"a message"
    with pytest.raises(grpc.RpcError) as refused:
        list(plane.stub("b").Download(request, timeout=10))
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    key = pb.UpdateKey(job="relay-1", round=7)
    assert plane.upload(stub, b"no safetensors", key=key, weight=0.0).status == Status.STORED
    [answer] = answers
    assert plane.spool.path(answer.file).read_bytes() == b"no safetensors"


def test_next_lists_training_first_and_not_too_many_messages(plane):
    for number in range(30, 0, -1):
        a_message(plane, number, f"{number}".encode())
    listed = unpack(plane.stub("a").Next(ASK, timeout=10))
    assert [(one.job, one.round) for one in listed] == [
        (plane.job, 1), *[("relay-1", number) for number in range(1, 24)],
    ]  # fmt: skip


def test_next_says_which_jobs_are_over(plane):
    asked = pb.NextRequest(holding=["relay-0", plane.job])
    assert list(plane.stub("a").Next(asked, timeout=10).ended) == ["relay-0"]


def test_a_download_goes_on_at_an_offset_and_is_counted(plane):
    stub, whole = plane.stub("a"), plane.blobs.path(plane.model.sha256).read_bytes()
    for offset in (0, 5_000_000):
        request = pb.DownloadRequest(sha256=plane.model.sha256, offset=offset)
        assert b"".join(chunk.data for chunk in stub.Download(request, timeout=30)) == whole[offset:]
    assert plane.round.down_bytes == 2 * len(whole) - 5_000_000


def test_a_small_file_is_read_once_for_all_devices_and_again_when_it_is_another(plane, monkeypatch):
    reads, pread = [], os.pread
    monkeypatch.setattr(fleet_service.os, "pread", lambda *given: reads.append(given[1:]) or pread(*given))
    for content, times in ((b"first", 2), (b"other", 1), (b"", 1)):
        path = plane.blobs.path("ab" * 32)
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        for _ in range(times):
            for device in "ab":
                request = pb.DownloadRequest(sha256="ab" * 32)
                assert b"".join(one.data for one in plane.stub(device).Download(request, timeout=30)) == content
    assert len(reads) == 2


def test_a_region_that_cannot_fetch_a_blob_says_why(plane):
    async def fetch(_sha256):
        raise CloudUnreachable("the download was given up: this region waits for disk space")

    plane.service._deps = dataclasses.replace(plane.service._deps, fetch=fetch)
    with pytest.raises(grpc.RpcError) as refused:
        list(plane.stub("a").Download(pb.DownloadRequest(sha256=plane.model.sha256), timeout=30))
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "waits for disk space" in refused.value.details()


def test_an_upload_is_durable_in_the_queue_and_acknowledged_once(plane):
    stub, data = plane.stub("a"), update_bytes()
    assert plane.upload(stub, data).status == Status.STORED
    answer = plane.next_answer()
    assert (answer.device, answer.weight, answer.metrics) == ("a", 2.0, {"loss": 0.5})
    assert plane.spool.path(answer.file).read_bytes() == data
    assert plane.jobs.open_round(plane.job, 1, ()) == [answer]
    assert plane.round.up_bytes == len(data)
    assert plane.upload(stub, data).status == Status.STORED  # a replay is acknowledged, not folded
    assert plane.done.empty()
    assert not stub.Next(ASK, timeout=10).assignments


def test_an_evaluation_is_durable_with_its_update_and_counts_once(plane):
    stub, data = plane.stub("a"), update_bytes()
    evaluation = pb.Evaluation(weight=4.0, metrics={"accuracy": 0.5})
    assert plane.upload(stub, data, evaluation=evaluation).status == Status.STORED
    answer = plane.next_answer()
    assert answer.evaluation == DeviceEvaluation(metrics={"accuracy": 0.5}, weight=4.0)
    assert plane.jobs.open_round(plane.job, 1, ()) == [answer]
    again = pb.Evaluation(weight=9.0, metrics={"accuracy": 1.0})
    assert plane.upload(stub, data, evaluation=again).status == Status.STORED
    assert plane.jobs.open_round(plane.job, 1, ()) == [answer]


def test_the_kinds_that_an_agent_knows_are_noted(plane):
    assert not plane.rounds.lacks("a", "evaluate")  # it has said nothing yet
    plane.stub("a").Next(pb.NextRequest(knows=["fit", "deliver", "fly"]), timeout=10)
    assert plane.rounds.lacks("a", "evaluate")
    plane.stub("a").Next(ASK, timeout=10)
    assert not plane.rounds.lacks("a", "evaluate")


def test_an_upload_that_was_cut_goes_on(plane):
    stub, data = plane.stub("a"), update_bytes()
    state = plane.upload(stub, data, cut=7_000_000)
    assert (state.status, state.offset) == (Status.PARTIAL, 7_000_000)
    key = pb.UpdateKey(job=plane.job, round=1)
    assert stub.Resume(key, timeout=10).offset == 7_000_000
    assert plane.round.waiting() == {"a", "b"}
    assert plane.upload(stub, data, offset=9_000_000).offset == 7_000_000  # a gap is not taken
    assert plane.upload(stub, data, offset=7_000_000).status == Status.STORED
    assert plane.spool.path(plane.next_answer().file).read_bytes() == data


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"size": 100_000_000}, "has 100000000 bytes; at most"),
        ({"size": 1_000_001}, "more than the 1000001 bytes"),
        ({"size": 1_000_000}, "BLAKE3"),  # what comes after is not read
        ({"blake3": "0" * 64}, "BLAKE3"),
    ],
)
def test_a_bad_upload_is_refused_and_counts_as_the_devices_failure(plane, changes, reason):
    state = plane.upload(plane.stub("a"), update_bytes(), **changes)
    assert state.status == Status.REFUSED
    assert reason in state.reason
    answer = plane.next_answer()
    assert (answer.device, answer.file) == ("a", None)
    assert reason in answer.reason


def test_bytes_that_are_no_tree_are_refused(plane):
    state = plane.upload(plane.stub("a"), b"\x07" * 1000)
    assert state.status == Status.REFUSED
    assert "tree" in state.reason


def test_another_round_is_stale_and_another_cohort_is_refused(plane):
    data = update_bytes()
    stale = plane.upload(plane.stub("a"), data, key=pb.UpdateKey(job=plane.job, round=2))
    assert (stale.status, stale.reason) == (Status.STALE, f"round 2 of job {plane.job} is not open")
    assert plane.upload(plane.stub("c"), data).status == Status.REFUSED
    plane.round.close()
    assert plane.upload(plane.stub("b"), data).status == Status.STALE
    assert not plane.round.has_answered("b")


def test_a_region_does_not_refuse_the_update_of_a_device_that_it_may_be_asked_for_yet(plane):
    """The device moved here during the round: it keeps its update, instead of training again."""
    plane.is_region = True
    stub, data = plane.stub("c"), update_bytes()
    with pytest.raises(grpc.RpcError, match="has not been asked for the device's part in this round yet") as refused:
        plane.upload(stub, data)
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    plane.round.join(["c"])
    assert plane.upload(stub, data).status == Status.STORED


def test_a_failure_is_an_answer_with_its_reason(plane):
    key = pb.UpdateKey(job=plane.job, round=1)
    plane.stub("b").Fail(pb.FailureReport(key=key, reason="task raised ValueError"), timeout=10)
    answer = plane.next_answer()
    assert (answer.device, answer.file, answer.reason) == ("b", None, "task raised ValueError")


def test_a_device_that_was_removed_is_told_so(plane):
    stub = plane.stub("a")
    plane.known.discard("a")
    with pytest.raises(grpc.RpcError) as error:
        stub.Next(pb.NextRequest(), timeout=10)
    assert error.value.code() == grpc.StatusCode.PERMISSION_DENIED
    assert "'a' is not enrolled" in error.value.details()


def test_a_certificate_of_another_ca_does_not_get_in(plane, tmp_path):
    other = tmp_path / "other-ca"
    other.mkdir()
    tls.create_ca(other)
    with pytest.raises(grpc.RpcError) as error:
        plane.stub("a", other).Next(pb.NextRequest(), timeout=3)
    assert error.value.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}


@pytest.mark.parametrize(
    ("sha256", "code"),
    [("../cloud.db", grpc.StatusCode.INVALID_ARGUMENT), ("0" * 64, grpc.StatusCode.NOT_FOUND)],
)
def test_a_blob_that_is_not_there_is_said_so(plane, sha256, code):
    with pytest.raises(grpc.RpcError) as error:
        list(plane.stub("a").Download(pb.DownloadRequest(sha256=sha256), timeout=10))
    assert error.value.code() == code


def test_an_upload_without_a_header_is_an_error_of_its_sender(plane):
    with pytest.raises(grpc.RpcError) as error:
        plane.stub("a").Upload(iter([pb.UploadChunk(data=b"x")]), timeout=10)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_uploads_of_one_update_side_by_side_are_one_update(plane):
    """A rogue device whose second stream would write into what the first has brought."""
    stub, data, poison = plane.stub("a"), update_bytes(), update_bytes(np.nan)
    half, begun = threading.Event(), threading.Event()

    def slow():
        header = pb.UploadHeader(
            key=pb.UpdateKey(job=plane.job, round=1), size=len(poison), blake3=blake3(poison).hexdigest(), weight=1.0
        )
        yield pb.UploadChunk(header=header)
        yield pb.UploadChunk(data=poison[:1_000_000])
        begun.set()
        assert half.wait(20)
        yield pb.UploadChunk(data=poison[1_000_000:2_000_000])

    late = stub.Upload.future(slow(), timeout=30)
    assert begun.wait(10)
    assert plane.upload(stub, data).status == Status.STORED
    half.set()
    assert late.code() in {grpc.StatusCode.ABORTED, grpc.StatusCode.OK}
    assert plane.spool.path(plane.next_answer().file).read_bytes() == data
    assert plane.done.empty()


def test_stalled_uploads_of_one_device_hold_up_no_other(plane):
    rogue, stop = plane.stub("b"), threading.Event()

    def stalled():
        yield pb.UploadChunk(header=pb.UploadHeader(key=pb.UpdateKey(job=plane.job, round=1), size=100))
        stop.wait(30)

    calls = [rogue.Upload.future(stalled(), timeout=30) for _ in range(140)]  # more than places are
    assert plane.upload(plane.stub("a"), update_bytes()).status == Status.STORED
    stop.set()
    for call in calls:
        call.cancel()


def test_downloads_that_nobody_reads_hold_up_no_other(plane):
    request = pb.DownloadRequest(sha256=plane.model.sha256)
    rogue = plane.stub("b")
    unread = [rogue.Download(request, timeout=30) for _ in range(140)]
    assert sum(len(chunk.data) for chunk in plane.stub("a").Download(request, timeout=10)) == plane.model.size
    for call in unread:
        call.cancel()


def test_a_resumed_upload_with_a_damaged_part_begins_again(plane):
    stub, data = plane.stub("a"), update_bytes()
    plane.upload(stub, update_bytes(7.0), cut=5_000_000)
    state = plane.upload(stub, data, offset=5_000_000)
    assert (state.status, state.offset) == (Status.PARTIAL, 0)
    assert plane.upload(stub, data).status == Status.STORED


@pytest.mark.parametrize("metrics", [{str(n): 0.0 for n in range(101)}, {"n" * 201: 0.0}])
def test_too_many_metrics_are_refused(plane, metrics):
    state = plane.upload(plane.stub("a"), update_bytes(), metrics=metrics)
    assert state.status == Status.REFUSED
    assert "metrics" in state.reason


def test_a_cloud_that_cannot_store_says_so_and_takes_the_update_later(plane):
    stub, data = plane.stub("a"), update_bytes()
    folder = plane.spool.file(plane.job, 1, "a").parent
    folder.parent.mkdir(exist_ok=True)
    folder.write_bytes(b"in the way")
    with pytest.raises(grpc.RpcError) as error:
        plane.upload(stub, data)
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "the cloud cannot store it" in error.value.details()
    folder.unlink()
    assert plane.upload(stub, data).status == Status.STORED


def test_a_stopping_cloud_does_not_say_that_a_round_is_over(plane):
    stub, key = plane.stub("a"), pb.UpdateKey(job=plane.job, round=1)
    plane.rounds.interrupt(CloudStopping("end"))
    plane.round.close()
    plane.rounds.remove(plane.round)
    for attempt in (lambda: plane.upload(stub, update_bytes()), lambda: stub.Resume(key, timeout=10)):
        with pytest.raises(grpc.RpcError) as error:
            attempt()
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("part", [b"\xff" * 100, b"\x0a\xff\xff\xff\xff\x7f"])
def test_bytes_that_are_no_message_are_their_senders_error(plane, part):
    plane.stub("a")
    upload = plane._channels[-1].stream_unary("/edgefl.v1.Fleet/Upload")
    header = pb.UploadHeader(key=pb.UpdateKey(job=plane.job, round=1), size=100)
    for parts in ([part], [pb.UploadChunk(header=header).SerializeToString(), part]):
        with pytest.raises(grpc.RpcError) as error:
            upload(iter(parts), timeout=10)
        assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("reason", ["\x1b[2J[red]boom\nupdate.stored device=b", "x\0y", "\u202e", "long " * 100_000])
def test_a_reason_is_clean_where_it_enters(plane, reason):
    key = pb.UpdateKey(job=plane.job, round=1)
    plane.stub("b").Fail(pb.FailureReport(key=key, reason=reason), timeout=10)
    kept = plane.next_answer().reason
    assert is_safe(kept)
    assert len(kept) <= 2000
    [answer] = plane.jobs.open_round(plane.job, 1, ("a", "b"))
    assert answer.reason == kept


@pytest.mark.parametrize(
    "header",
    [{"weight": math.nan}, {"weight": math.inf}, {"metrics": {"loss": math.nan}}, {"metrics": {"loss": -math.inf}},
     {"metrics": {"\x1b[2J": 1.0}}, {"metrics": {"a\nb": 1.0}}, {"size": 2**64 - 1}, {"offset": 2**64 - 1},
     {"blake3": "\x1b" * 5000}, {"key": pb.UpdateKey(job="\x1b[2J\n" * 1000, round=2**32 - 1)}],
)  # fmt: skip
def test_no_header_costs_more_than_its_upload(plane, header):
    state = plane.upload(plane.stub("a"), update_bytes(), **header)
    assert state.status != Status.STORED
    assert is_safe(state.reason)
    assert plane.upload(plane.stub("b"), update_bytes()).status == Status.STORED
    assert plane.stub("b").Next(pb.NextRequest(agent_version="\x1b" * 9999, holding=["\x1b\n"] * 20_000), timeout=10)
