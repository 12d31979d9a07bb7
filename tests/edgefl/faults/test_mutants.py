"""The simulator finds each mutant: so it can fail."""

from __future__ import annotations

import pytest

from cloud.state.jobs import Jobs
from edgefl.faults import mutants
from edgefl.faults.cli import run_seeds, shrink
from edgefl.faults.fleet import TOPOLOGIES

ALL = tuple(TOPOLOGIES)


def found(name, topologies, seeds):
    return next((one for one in run_seeds(range(seeds), topologies, name) if one.wrong), None)


def test_a_mutant_is_there_within_the_block_only():
    real = Jobs.record
    with mutants.installed("early-acknowledgement"):
        assert Jobs.record is not real
    with mutants.installed(""):
        assert Jobs.record is real


@pytest.mark.soak
def test_an_acknowledgement_before_the_commit_is_found_and_shrunk():
    verdict = found("early-acknowledgement", ("flat",), 100)
    assert verdict is not None
    left = shrink(verdict, ("flat",), "early-acknowledgement")
    assert len(left) < max(2, len(verdict.settings.faults))


@pytest.mark.soak
@pytest.mark.parametrize("name", mutants.MUTANTS)
def test_each_mutant_is_found_within_a_thousand_seeds(name):
    assert found(name, ALL, 1000) is not None
