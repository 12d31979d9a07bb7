"""Settings of choosing, sharing and stopping that cannot be used; see also test_needs.py and test_stopping.py."""

from __future__ import annotations

import math

import pytest

from edgefl.config import JobConfig, from_dict
from edgefl.errors import ConfigError


@pytest.mark.parametrize(
    ("rounds", "complaint"),
    [
        ({"priority": 1001}, r"rounds\.priority=1001 must be -1000 or more, and at most 1000"),
        ({"weight": 0.0}, r"rounds\.weight=0\.0 must be 0\.01 or more"),
        ({"fairness": math.nan}, r"rounds\.fairness=nan must be 0 or more"),
        ({"stop": {"metric": "a", "at": math.inf}}, r"rounds\.stop\.at=inf must be"),
        ({"stop": {"metric": "a", "patience": -1}}, r"rounds\.stop\.patience=-1 must be 0 or more"),
        ({"stop": {"metric": "a", "at": 1, "direction": "up"}}, "is not one of: auto, max, min"),
        ({"stop": {"metric": "a\n", "at": 1}}, "must be printable"),
        ({"stop": {"metric": "a", "until": 1}}, r"unknown configuration key 'rounds\.stop\.until'"),
    ],
)
def test_what_is_refused(rounds, complaint):
    with pytest.raises(ConfigError, match=complaint):
        from_dict(JobConfig, {"rounds": rounds})
