"""Assignments on the data plane: each kind has a field of its own, and nobody guesses."""

from __future__ import annotations

import dataclasses
import json

import pytest

from edgefl.config import TrainConfig
from edgefl.errors import ProtocolError
from edgefl.protocols import fleet_pb2 as pb
from edgefl.protocols.assignments import pack, unpack
from edgefl.protocols.messages import ASSIGNMENTS, Assignment, BlobRef, Deliver, Fit, Signed

BUNDLE = Signed(text="{}", key_id="k", signature="c2ln")
FIT = Fit(
    job="job", round=3, model=BlobRef(sha256="ab", size=4), model_blake3="00", bundle=BUNDLE, train=TrainConfig(),
    deadline_s=600.0, max_update_bytes=9, frozen=BlobRef(sha256="ef", size=4),
)  # fmt: skip
DELIVER = Deliver(
    job="relay", round=7, envelope="e", content=BlobRef(sha256="cd", size=4), content_blake3="00", bundle=BUNDLE,
    deadline_s=60.0, max_update_bytes=9,
)  # fmt: skip


def test_the_kinds_are_those_of_the_proto() -> None:
    fields = pb.Assignment.DESCRIPTOR.oneofs_by_name["asked"].fields
    assert {field.name for field in fields} == set(ASSIGNMENTS)
    assert {kind: schema.__dataclass_fields__["kind"].default for kind, schema in ASSIGNMENTS.items()} == {
        kind: kind for kind in ASSIGNMENTS
    }


def test_each_travels_in_the_field_of_its_kind_and_comes_back() -> None:
    assert [pack(one).WhichOneof("asked") for one in (FIT, DELIVER)] == ["fit", "deliver"]
    assert unpack(pb.NextReply(assignments=[pack(FIT), pack(DELIVER)])) == [FIT, DELIVER]


def test_what_a_device_fetches() -> None:
    assert [ref.sha256 for ref in FIT.blobs()] == ["ab", "ef"]
    assert [ref.sha256 for ref in dataclasses.replace(FIT, frozen=None).blobs()] == ["ab"]
    assert [ref.sha256 for ref in DELIVER.blobs()] == ["cd"]


def bytes_of(assignment: Assignment, **changes: object) -> bytes:
    return json.dumps(dataclasses.asdict(assignment) | changes).encode()


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (pb.NextReply(plans=[b"{}"]), "the cloud is older than this agent"),
        (pb.NextReply(assignments=[pb.Assignment()]), "work that this agent does not know; update the agent"),
        (pb.NextReply(assignments=[pb.Assignment(fit=b"{}")]), "Fit: "),
        (pb.NextReply(assignments=[pb.Assignment(fit=bytes_of(DELIVER))]), "Fit: "),
        (pb.NextReply(assignments=[pb.Assignment(fit=bytes_of(FIT, kind="fly"))]), "kind fit says that it is 'fly'"),
    ],
)
def test_what_is_no_assignment_is_refused(reply: pb.NextReply, said: str) -> None:
    with pytest.raises(ProtocolError, match=said):
        unpack(reply)
