"""Valid headers, and the messages for invalid ones."""

import math

import pytest

from cloud.uploads.upload_header import answer_of, evaluation_in, header_fault
from edgefl.protocols import fleet_pb2 as pb
from edgefl.records import DeviceEvaluation
from edgefl.terminal.text import is_safe


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({}, None),
        ({"size": 11}, "the update has 11 bytes; at most 10"),
        ({"metrics": {str(number): 1.0 for number in range(101)}}, "the update has 101 metrics"),
        ({"metrics": {"m" * 201: 1.0}}, "with names of up to 201 characters"),
        ({"weight": math.inf}, "weight is inf, expected a finite number"),
        ({"metrics": {"loss": math.nan}}, "metric 'loss' is nan"),
        ({"metrics": {"\x1b[2J": 1.0}}, "a name without control characters"),
    ],
)
def test_a_header_is_valid_or_the_message_names_its_fault(header, said):
    fault = header_fault(pb.UploadHeader(**{"size": 10, "weight": 1.0, "metrics": {"loss": 0.5}} | header), 10)
    assert fault is None if said is None else said in fault


def sent(**fields):
    return pb.UploadHeader(size=10, weight=1.0, evaluation=pb.Evaluation(**fields))


def test_an_evaluation_is_read_as_it_was_sent():
    assert evaluation_in(pb.UploadHeader(size=10)) is None
    found = evaluation_in(sent(weight=3.0, metrics={"accuracy": 0.5}))
    assert found == DeviceEvaluation(metrics={"accuracy": 0.5}, weight=3.0)
    answer = answer_of(sent(weight=3.0, metrics={"accuracy": 0.5}), "cam", "j/1/cam")
    assert (answer.device, answer.file, answer.evaluation) == ("cam", "j/1/cam", found)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"fault": "no\x1b[2J card\nhere"}, r"no\x1b[2J card here"),
        ({"fault": "x" * 10_000}, "xxx"),
        ({"weight": math.nan, "metrics": {"loss": 1.0}}, "a number is not finite"),
        ({"weight": 1.0, "metrics": {"loss": math.inf}}, "a number is not finite"),
        ({"weight": 1.0, "metrics": {"\x1b[2J": 1.0}}, "the name of a metric has control characters"),
        ({"weight": 1.0, "metrics": {str(n): 1.0 for n in range(201)}}, "it has 201 metrics"),
        ({"weight": 1.0, "metrics": {"m" * 201: 1.0}}, "names of up to 201 characters"),
    ],
)
def test_an_evaluation_that_cannot_be_stored_does_not_cost_the_update(fields, said):
    header = sent(**fields)
    found = evaluation_in(header)
    assert said in found.fault
    assert (found.metrics, header_fault(header, 10)) == ({}, None)
    assert len(found.fault) <= 2000
    assert is_safe(found.fault)
