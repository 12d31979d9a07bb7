"""Valid headers, and the messages for invalid ones."""

import math

import pytest

from cloud.dataplane.upload_header import header_fault
from edgefl.protocols import fleet_pb2 as pb


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
