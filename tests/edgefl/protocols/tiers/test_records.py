"""What a region and its parent tell each other: it survives the journey, and what cannot be is refused."""

import pytest

from edgefl.config import TrainConfig
from edgefl.errors import ProtocolError
from edgefl.protocols.messages import BlobRef, Evaluate, Fit, Signed
from edgefl.protocols.tiers import MAX_PARENTS, Member, RegionState, SumNote, Work, pack, unpack

SIGNED = Signed(text="{}", key_id="k", signature="s")
BLOB = BlobRef(sha256="0" * 64, size=1)
FIT = Fit(
    job="job-1", round=2, model=BLOB, model_blake3="00", bundle=SIGNED, train=TrainConfig(lr=0.25), deadline_s=5.0,
    max_update_bytes=10,
)  # fmt: skip
EVALUATE = Evaluate(
    job="job-1", round=3, model=BLOB, model_blake3="00", bundle=SIGNED, seed=4, deadline_s=5.0, max_update_bytes=10
)
STATE = RegionState(version="1", parent="cloud", host="r1.example", grpc_port=1, http_port=2, mqtt_port=3)


@pytest.mark.parametrize(
    "message",
    [
        Member(serials=["1f", "2e"], parents=["r1", "cloud"], tags={"site": "a"}),
        Member(serials=["1f"], is_region=True, parents=["cloud"]),
        Work(fit=FIT, devices=["a", "b"], offline_grace_s=3.0),
        Work(evaluate=EVALUATE, devices=[]),
        STATE,
        SumNote(weights={"a": 1.5}, failed={"b": "why"}, rejected={"c": "NaN"}, metrics={"loss": [3.0, 1.5]},
                evaluations={"a": {"accuracy": 0.5}}, evaluation_weights={"a": 2.0}, evaluation_faults={"b": "none"}),
    ],
)  # fmt: skip
def test_a_record_survives_the_journey(message):
    assert unpack(type(message), pack(message)) == message


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"{}", b'{"serials": "1f"}', b'{"serials": [1]}'])
def test_what_is_no_member_is_refused(data):
    with pytest.raises(ProtocolError):
        unpack(Member, data)


def test_more_parents_than_a_device_may_have():
    with pytest.raises(ProtocolError, match="parents"):
        Member(serials=["1"], parents=[f"r{number}" for number in range(MAX_PARENTS + 1)])


def test_work_is_one_assignment():
    assert Work(fit=FIT).assignment is FIT
    assert Work(evaluate=EVALUATE).assignment is EVALUATE
    for odd, count in ((Work(), 0), (Work(fit=FIT, evaluate=EVALUATE), 2)):
        with pytest.raises(ProtocolError, match=f"has {count} assignments"):
            _ = odd.assignment


def test_a_note_names_all_whose_answers_it_has():
    assert SumNote(weights={"a": 1.0}, failed={"b": ""}, rejected={"c": ""}).devices == {"a", "b", "c"}


def test_numbers_that_json_lacks_do_not_travel():
    with pytest.raises(ProtocolError, match="weights"):
        SumNote(weights={"a": float("nan")})
    with pytest.raises(ProtocolError, match="weights"):
        unpack(SumNote, b'{"weights": {"a": NaN}}')


@pytest.mark.parametrize("ports", [{"grpc_port": 0}, {"http_port": 65536}, {"mqtt_port": -1}])
def test_a_region_says_real_ports(ports):
    facts = {"version": "1", "parent": "cloud", "host": "h", "grpc_port": 1, "http_port": 2, "mqtt_port": 3}
    with pytest.raises(ProtocolError, match="_port"):
        RegionState(**{**facts, **ports})
