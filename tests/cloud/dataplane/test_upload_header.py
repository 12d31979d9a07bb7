"""Headers that are taken, and what is said of others."""

import math

import pytest

from cloud.dataplane.upload_header import header_fault
from edgefl.protocols import fleet_pb2 as pb


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({}, None),
        ({"size": 11}, "the update has 11 bytes; at most 10"),
        ({"metrics": {str(number): 1.0 for number in range(101)}}, "it has 101 metrics"),
        ({"metrics": {"m" * 201: 1.0}}, "the longest name of 201 characters"),
        ({"weight": math.inf}, "its weight is inf, not a finite number"),
        ({"metrics": {"loss": math.nan}}, "its metric 'loss' is nan"),
        ({"metrics": {"\x1b[2J": 1.0}}, "names without control characters"),
    ],
)
def test_a_header_is_taken_or_its_fault_is_said(header, said):
    fault = header_fault(pb.UploadHeader(**{"size": 10, "weight": 1.0, "metrics": {"loss": 0.5}} | header), 10)
    assert fault is None if said is None else said in fault
