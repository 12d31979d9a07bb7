"""The service for regions over real gRPC and TLS: who may speak, for whom, how often; and connections that break."""

from __future__ import annotations

import re
import threading

import grpc
import numpy as np
import pytest
from blake3 import blake3

from cloud.jobs.answers import AnswerRow
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols import fleet_pb2_grpc as rpc
from edgefl.protocols import tiers as protocol
from edgefl.protocols.tiers import RegionPart, SumNote
from edgefl.protocols.tiers.version import stated
from tests.cloud.region.server.test_work import until

STATED = stated()
PARTIAL, STORED, STALE, REFUSED, REFOLD = range(5)


def test_a_sum_is_an_answer_of_all_its_devices_and_durable(tiers):
    opened, uplink = tiers.open(), tiers.uplink("r1")
    note = SumNote(weights={"a": 3.0}, failed={"b": "no disk"})
    assert tiers.send(uplink, note).status == STORED
    assert tiers.yielded() == ["a", "b"]
    assert opened.waiting() == {"c", "d", "e"}
    answers = tiers.jobs.open_round(tiers.job, 1, ())
    assert answers == [
        AnswerRow(device="a", file=f"{tiers.job}/1/r1+1", weight=3.0, region="r1"),
        AnswerRow(device="b", reason="no disk", region="r1"),
    ]
    assert tiers.spool.path(answers[0].file).stat().st_size > 2_000_000
    assert opened.up_bytes > 2_000_000


def test_a_sum_that_is_sent_again_is_accepted_once(tiers):
    """Its acknowledgement was lost: the region learns that its devices are counted, and stops."""
    tiers.open()
    uplink = tiers.uplink("r1")
    assert tiers.send(uplink).status == STORED
    again = tiers.send(uplink, mean=tiers.mean(9.0), number=2)
    assert (again.status, sorted(again.without)) == (REFOLD, ["a", "b"])
    assert tiers.yielded() == ["a", "b"]
    assert len(tiers.jobs.open_round(tiers.job, 1, ())) == 2


def test_of_two_sums_with_one_device_the_second_is_folded_again(tiers):
    """A device that moved is in the sums of two regions; only its own answer is left out."""
    tiers.members.assign("b", ["r1", "r2"])
    tiers.open()
    first, second = tiers.uplink("r1"), tiers.uplink("r2")
    assert tiers.send(first).status == STORED
    state = tiers.send(second, SumNote(weights={"b": 3.0, "c": 2.0}), name="second")
    assert (state.status, list(state.without)) == (REFOLD, ["b"])
    assert tiers.send(second, SumNote(weights={"c": 2.0}), number=2, name="second").status == STORED
    assert tiers.yielded() == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("note", "strangers"),
    [
        (SumNote(weights={"a": 1.0, "c": 1.0}), ["c"]),
        (SumNote(weights={"a": 1.0, "e": 1.0}), ["e"]),
        (SumNote(weights={"a": 1.0}, failed={"nobody": "x"}), ["nobody"]),
        (SumNote(weights={"a": 1.0}, rejected={"d": "x"}, failed={"c": "y"}), ["c", "d"]),
    ],
)
def test_a_region_does_not_speak_for_the_devices_of_others(tiers, note, strangers, caplog):
    """Nothing of such a sum is accepted, and its own devices are not lost by it."""
    opened, uplink = tiers.open(), tiers.uplink("r1")
    state = tiers.send(uplink, note)
    assert (state.status, list(state.without)) == (REFOLD, strangers)
    assert state.reason == f"{', '.join(strangers)} may not connect below this region"
    assert "sum.strangers" in caplog.text
    assert len(opened.waiting()) == 5
    assert tiers.send(uplink, SumNote(weights={"a": 1.0}), number=2).status == STORED


def test_a_device_that_is_removed_while_its_region_has_its_update_costs_itself_alone(tiers):
    tiers.open()
    uplink = tiers.uplink("r1")
    tiers.enrolment.remove("b")
    tiers.members.note_change()
    state = tiers.send(uplink)
    assert (state.status, list(state.without)) == (REFOLD, ["b"])
    assert tiers.send(uplink, SumNote(weights={"a": 1.0}), number=2).status == STORED


@pytest.mark.parametrize(
    ("note", "reason"),
    [
        (SumNote(weights={"a": 0.0}), "weight is not finite and above 0"),
        (SumNote(weights={"a": 1.0}, metrics={"loss": [1.0, 2.0]}), "metric 'loss' has a weight of 2"),
        (SumNote(weights={"a": 1.0}, failed={"a": "x"}), "a is both a contributor and failed"),
        (
            SumNote(weights={"a": 1.0}, regions={"r2": RegionPart(parent="cloud", admitted=["a"])}),
            "a part of region 'r2', which is not below region 'r1'",
        ),
    ],
)
def test_a_sum_that_cannot_be_is_refused_and_changes_nothing(tiers, note, reason):
    opened, uplink = tiers.open(), tiers.uplink("r1")
    state = tiers.send(uplink, note)
    assert state.status == REFUSED
    assert reason in state.reason
    assert len(opened.waiting()) == 5
    assert tiers.send(uplink, number=2).status == STORED  # the same region may still say what is right


@pytest.mark.parametrize(
    "mean",
    [
        {"w": np.zeros(500_000, np.float32)},
        {"w": np.zeros(500_000, np.float64), "n": np.zeros((), np.float64)},
        {"w": np.zeros((500, 1000), np.float32), "n": np.zeros((), np.float64)},
        {"w": np.zeros(500_000, np.float32), "n": np.zeros((), np.float64), "x": np.zeros(1, np.float32)},
    ],
    ids=["missing", "dtype", "shape", "unknown"],
)
def test_a_sum_of_other_tensors_is_refused(tiers, mean):
    opened, uplink = tiers.open(), tiers.uplink("r1")
    state = tiers.send(uplink, mean=mean)
    assert (state.status, "tensor" in state.reason) == (REFUSED, True)
    assert len(opened.waiting()) == 5


def test_a_sum_of_a_device_that_is_not_asked_is_folded_again_without_it(tiers):
    tiers.open(cohort=("a", "c"))
    uplink = tiers.uplink("r1")
    state = tiers.send(uplink)
    assert (state.status, list(state.without)) == (REFOLD, ["b"])


def test_a_sum_whose_file_alone_is_here_is_taken_again(tiers):
    """The parent was killed after it had placed the file, and before it had recorded the sum."""
    tiers.open()
    placed = tiers.spool.file(tiers.job, 1, "r1+1")
    placed.parent.mkdir(parents=True)
    placed.write_bytes(b"from before the kill")
    uplink = tiers.uplink("r1")
    assert tiers.send(uplink, SumNote(weights={"a": 1.0})).status == STORED
    assert placed.read_bytes() != b"from before the kill"


def test_a_number_that_is_used_does_not_overwrite_an_accepted_sum(tiers):
    """A region that lost its memory in a kill counts from anew; its first sum stays what it was."""
    tiers.open()
    uplink = tiers.uplink("r1")
    assert tiers.send(uplink, SumNote(weights={"a": 1.0})).status == STORED
    file = tiers.spool.path(tiers.jobs.open_round(tiers.job, 1, ())[0].file)
    before = file.read_bytes()
    state = tiers.send(uplink, SumNote(weights={"b": 1.0}), mean=tiers.mean(9.0))
    assert (state.status, "has the number 1" in state.reason) == (REFUSED, True)
    assert file.read_bytes() == before
    assert tiers.send(uplink, SumNote(weights={"b": 1.0}), number=2).status == STORED


def test_a_sum_that_is_too_large_is_refused_before_its_bytes(tiers):
    opened, uplink = tiers.open(), tiers.uplink("r1")
    state = tiers.send(uplink, mean={"w": np.zeros(2_000_000, np.float32)})
    assert state.status == REFUSED
    assert "bytes; at most" in state.reason
    assert opened.up_bytes == 0


def test_a_round_that_is_over_or_unknown_is_stale(tiers):
    tiers.open(cohort=("a", "b"))
    uplink = tiers.uplink("r1")
    assert tiers.send(uplink, round_number=7).status == STALE
    assert tiers.send(uplink).status == STORED
    assert tiers.yielded() == ["a", "b", "closed"]
    assert tiers.send(uplink, number=2).status == STALE


def stub(channel, metadata=STATED):
    """Return the calls of a region; they state its version."""
    return rpc.TierStub(grpc.intercept_channel(channel, _Stating(metadata)))


class _Stating(grpc.UnaryUnaryClientInterceptor, grpc.StreamStreamClientInterceptor, grpc.StreamUnaryClientInterceptor):
    def __init__(self, metadata):
        self._metadata = metadata

    def _call(self, continuation, details, request):
        return continuation(details._replace(metadata=self._metadata), request)

    intercept_unary_unary = intercept_stream_stream = intercept_stream_unary = _call


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ((), "region 'r1' runs edgefl of an unknown version and speaks version 0 .*Update region 'r1'"),
        ((("edgefl-tier-protocol", "99"), ("edgefl-version", "9.1")), "edgefl 9.1 .* version 99 .*Update the cloud"),
        ((("edgefl-tier-protocol", "x"), ("edgefl-version", "1" * 5000)), "speaks version 0"),
    ],
)  # fmt: skip
def test_a_region_of_another_version_is_refused_in_words(tiers, metadata, words, caplog):
    opened = tiers.open()
    data = tiers.sum_file(SumNote(weights={"a": 1.0, "b": 3.0}), tiers.mean()).path.read_bytes()
    with tiers.channel("r1") as channel:
        tier = stub(channel, metadata)
        for call in (
            lambda: list(tier.Attach(iter([]), timeout=10)),
            lambda: tier.Resume(pb.UpdateKey(job=tiers.job, round=1, sum=1), timeout=10),
            lambda: tier.Upload(iter([header(tiers, data)]), timeout=10),
            lambda: tier.Renew(pb.RenewRequest(), timeout=10),
        ):
            code, why = details(call)
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            assert re.search(words, why)
            assert len(why) < 400
    assert "region.other_version" in caplog.text
    assert len(opened.waiting()) == 5


def details(call):
    with pytest.raises(grpc.RpcError) as refused:
        call()
    return refused.value.code(), refused.value.details()


def test_a_device_is_no_region_and_a_region_no_device(tiers):
    with tiers.channel("a") as device, tiers.channel("r1") as region:
        code, why = details(lambda: list(stub(device).Attach(iter([]), timeout=10)))
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert "the certificate of 'a' is that of a device; this call is for a region's" in why
        code, _ = details(lambda: stub(device).Resume(pb.UpdateKey(job="j", round=1, sum=1), timeout=10))
        assert code is grpc.StatusCode.PERMISSION_DENIED
        code, _ = details(lambda: stub(device).Upload(iter([]), timeout=10))
        assert code is grpc.StatusCode.PERMISSION_DENIED
        code, why = details(lambda: rpc.FleetStub(region).Next(pb.NextRequest(), timeout=10))
        assert code is grpc.StatusCode.PERMISSION_DENIED
        assert "the certificate of 'r1' is that of a region; this call is for a device's" in why


def test_a_region_of_another_region_does_not_attach_here(tiers):
    with tiers.channel("r2a") as region:
        code, why = details(lambda: list(stub(region).Attach(iter([]), timeout=10)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "r2a is not a region below cloud" in why


def test_a_region_that_was_removed_is_out(tiers):
    tiers.enrolment.remove("r1")
    tiers.members.note_change()
    with tiers.channel("r1") as region:
        code, why = details(lambda: list(stub(region).Attach(iter([]), timeout=10)))
    assert (code, "not enrolled" in why) == (grpc.StatusCode.PERMISSION_DENIED, True)


def header(tiers, data, offset=0, note=None, number=1):
    note = note or SumNote(weights={"a": 1.0, "b": 3.0})
    return pb.UploadChunk(
        header=pb.UploadHeader(
            key=pb.UpdateKey(job=tiers.job, round=1, sum=number), offset=offset, size=len(data),
            blake3=blake3(data).hexdigest(), sum=protocol.pack(note),
        )
    )  # fmt: skip


def test_a_cut_connection_is_resumed_where_it_broke(tiers):
    opened = tiers.open()
    data = tiers.sum_file(SumNote(weights={"a": 1.0, "b": 3.0}), tiers.mean()).path.read_bytes()
    hold, key = threading.Event(), pb.UpdateKey(job=tiers.job, round=1, sum=1)
    with tiers.channel("r1") as channel:
        tier = stub(channel)

        def part():
            yield header(tiers, data)
            yield pb.UploadChunk(data=data[:1_000_000])
            yield pb.UploadChunk(data=data[1_000_000:1_500_000])
            hold.wait(20)

        call = tier.Upload.future(part(), timeout=30)
        while opened.up_bytes < 1_500_000:
            assert call.running()
        call.cancel()
        hold.set()
        while (offset := tier.Resume(key, timeout=10).offset) < 1_000_000:  # it is still being written
            pass
        assert 1_000_000 <= offset <= 1_500_000
        rest = [header(tiers, data, offset), pb.UploadChunk(data=data[offset:])]
        assert tier.Upload(iter(rest), timeout=30).status == STORED
    assert tiers.yielded() == ["a", "b"]
    stored = tiers.spool.path(tiers.jobs.open_round(tiers.job, 1, ())[0].file)
    assert stored.read_bytes() == data


def pieces(data, start=0):
    return [pb.UploadChunk(data=data[at : at + 500_000]) for at in range(start, len(data), 500_000)]


def test_a_damaged_part_begins_again(tiers):
    tiers.open()
    data = tiers.sum_file(SumNote(weights={"a": 1.0, "b": 3.0}), tiers.mean()).path.read_bytes()
    with tiers.channel("r1") as channel:
        tier = stub(channel)
        short = [header(tiers, data), pb.UploadChunk(data=bytes(500_000))]
        assert tier.Upload(iter(short), timeout=30) == pb.UploadState(status="PARTIAL", offset=500_000)
        rest = [header(tiers, data, 500_000), *pieces(data, 500_000)]
        assert tier.Upload(iter(rest), timeout=30) == pb.UploadState(status="PARTIAL")
        assert tier.Upload(iter([header(tiers, data), *pieces(data)]), timeout=30).status == STORED


def test_more_bytes_than_announced_are_refused(tiers):
    opened = tiers.open()
    data = tiers.sum_file(SumNote(weights={"a": 1.0, "b": 3.0}), tiers.mean()).path.read_bytes()
    with tiers.channel("r1") as channel:
        chunks = [header(tiers, data), *(pb.UploadChunk(data=data[:1_000_000]) for _ in range(9))]
        state = stub(channel).Upload(iter(chunks), timeout=30)
    assert (state.status, "more than the" in state.reason) == (REFUSED, True)
    assert len(opened.waiting()) == 5


@pytest.mark.parametrize("first", [pb.UploadChunk(data=b"x"), pb.UploadChunk()])
def test_an_upload_without_a_header_is_refused(tiers, first):
    tiers.open()
    with tiers.channel("r1") as channel:
        code, why = details(lambda: stub(channel).Upload(iter([first]), timeout=10))
    assert (code, why) == (grpc.StatusCode.INVALID_ARGUMENT, "the first message must be the header")


@pytest.mark.parametrize("note", [b"", b"{", b'{"weights": {"a": NaN}}', b'{"weights": 1}', b"[]"])
def test_a_note_that_is_none_is_refused(tiers, note):
    tiers.open()
    chunk = pb.UploadChunk(
        header=pb.UploadHeader(key=pb.UpdateKey(job=tiers.job, round=1, sum=1), size=1, blake3="00", sum=note)
    )
    with tiers.channel("r1") as channel:
        code, _ = details(lambda: stub(channel).Upload(iter([chunk]), timeout=10))
    assert code is grpc.StatusCode.INVALID_ARGUMENT


def test_a_parent_that_is_killed_before_it_acknowledged_has_the_sum_once(tiers):
    """What is in the database is in the round after the restart, and the region that asks again is told so."""
    tiers.open()
    uplink = tiers.uplink("r1")
    assert tiers.send(uplink).status == STORED
    tiers.stop()
    tiers.rounds.remove(tiers.rounds.get(tiers.job, 1))
    opened = tiers.open()
    for answer in tiers.jobs.open_round(tiers.job, 1, ()):
        assert opened.accept(answer, lambda _answer: None)
    tiers.start()
    state = tiers.send(uplink, number=2)
    assert (state.status, sorted(state.without)) == (REFOLD, ["a", "b"])
    assert opened.waiting() == {"c", "d", "e"}


def test_a_sum_that_began_with_another_model_is_stale(tiers):
    opened, uplink = tiers.open(), tiers.uplink("r1")
    assert tiers.send(uplink, model="1" * 64).status == STALE
    assert opened.waiting() == {"a", "b", "c", "d", "e"}
    assert tiers.send(uplink, model=opened.assignment.model.sha256, number=2).status == STORED


def test_a_sum_for_a_rule_that_needs_each_update_is_refused(tiers):
    """Its devices have moved below a region during the round."""
    opened, uplink = tiers.open(), tiers.uplink("r1")
    opened.unreachable = lambda region: f"region {region} sends sums" if region else ""
    state = tiers.send(uplink)
    assert (state.status, state.reason) == (REFUSED, "region r1 sends sums")


def test_a_sum_is_not_given_up_while_a_region_opens_its_round_again(tiers, caplog):
    """Its round is closed, and open again a moment later: the region below sends the sum once more."""
    opened, uplink = tiers.open(), tiers.uplink("r1")
    tiers.paused.add((tiers.job, 1))
    opened.close()
    sending = threading.Thread(target=lambda: states.append(tiers.send(uplink)))
    states = []
    sending.start()
    until(lambda: "sum.waits" in caplog.text)
    tiers.rounds.remove(opened)
    again = tiers.open()
    sending.join(30)
    assert [one.status for one in states] == [STORED]
    assert again.waiting() == {"c", "d", "e"}
