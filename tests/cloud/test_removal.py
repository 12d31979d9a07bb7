"""A device that is removed while it uploads: its calls end, its update is refused, the round goes on."""

import threading

import grpc
import numpy as np
from blake3 import blake3

from cloud.jobs.answers import AnswerRow
from cloud.state.enrolment import REMOVED
from edgefl.protocols import fleet_pb2 as pb


def test_a_device_that_is_removed_loses_its_calls_and_its_update(plane):
    stub, data, more = plane.stub("a"), np.zeros(3_000_000, np.float32).tobytes(), threading.Event()

    def chunks():
        key = pb.UpdateKey(job=plane.job, round=1)
        yield pb.UploadChunk(header=pb.UploadHeader(key=key, size=len(data), blake3=blake3(data).hexdigest(), weight=1))
        yield pb.UploadChunk(data=data[:1_000_000])
        more.wait(20)

    upload = stub.Upload.future(chunks(), timeout=30)
    while not plane.round.up_bytes:
        assert upload.running()
    plane.known.discard("a")
    plane.service.forget("a")
    assert upload.exception(10).code() == grpc.StatusCode.PERMISSION_DENIED
    assert upload.details() == REMOVED
    more.set()
    assert plane.next_answer() == AnswerRow(device="a", reason=REMOVED)
    assert plane.round.waiting() == {"b"}
    plane.stub("b").Next(pb.NextRequest(), timeout=10)


def test_a_former_certificate_does_not_use_up_its_successors_calls(plane):
    former = plane.stub("a")
    former.Next(pb.NextRequest(), timeout=10)
    again = plane.stub("a")
    again.Next(pb.NextRequest(), timeout=10)
    assert len(plane.paced) == 2
    assert len(set(plane.paced)) == 2
