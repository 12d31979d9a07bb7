"""Histories are kept only where a cohort depends on them."""

from __future__ import annotations

import pytest

from edgefl.choosing.needs import reads_history
from edgefl.config import RoundsConfig
from edgefl.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "reads"),
    [
        ({}, False),
        ({"select": "mem_mb > 1 and tag.site == 'a'"}, False),
        ({"select": "mem_mb > 1 and staleness > 2"}, True),
        ({"utility": "oort", "clients": 2}, True),
    ],
)
def test_what_needs_a_history(settings, reads):
    assert reads_history(RoundsConfig(**settings)) is reads


def test_a_utility_needs_something_to_choose_from():
    with pytest.raises(ConfigError, match=r"rounds\.clients=0 asks all; set rounds\.clients"):
        RoundsConfig(utility="oort")
    with pytest.raises(ConfigError, match="is not one of: random, oort"):
        RoundsConfig(utility="best", clients=1)
