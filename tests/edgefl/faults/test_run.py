"""Seeds: no update is lost or counted twice, and the same seed gives the same trace, byte for byte."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from edgefl.faults.fleet import TOPOLOGIES
from edgefl.faults.plan import draw
from edgefl.faults.run import Simulator

NUM_PARTS, NUM_SEEDS, NUM_SOAK_SEEDS = 12, 300, 2000
ALL = tuple(TOPOLOGIES)


def failures(seeds):
    with Simulator() as simulator:
        verdicts = {seed: simulator.run(draw(seed)).wrong for seed in seeds}
    return {seed: wrong for seed, wrong in verdicts.items() if wrong}


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_no_seed_loses_an_update_or_counts_one_twice(part):
    assert failures(range(part, NUM_SEEDS, NUM_PARTS)) == {}


@pytest.mark.soak
@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_more_seeds(part):
    assert failures(range(NUM_SEEDS + part, NUM_SOAK_SEEDS, NUM_PARTS)) == {}


def test_a_seed_gives_the_same_trace_after_other_seeds():
    with Simulator(ALL) as simulator:
        once = [simulator.run(draw(seed)) for seed in (4, 7, 8)]
        again = [simulator.run(draw(seed)) for seed in (8, 4, 7)]
    assert once[0].trace == again[1].trace
    assert once[1].trace == again[2].trace
    assert once[2].trace == again[0].trace


@pytest.mark.soak
def test_a_seed_gives_the_same_trace_in_another_process_with_other_hashes_of_text():
    script = (
        "from edgefl.faults.plan import draw\nfrom edgefl.faults.run import Simulator\n"
        "with Simulator() as simulator:\n    print(*(simulator.run(draw(seed)).digest for seed in (5, 7)))"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": number}, capture_output=True,
            text=True, check=True,
        ).stdout
        for number in ("0", "1", "2")
    }  # fmt: skip
    assert len(digests) == 1
