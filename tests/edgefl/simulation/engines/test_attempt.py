"""An engine's fault is contained; the end of a program is not."""

import pytest

from edgefl.simulation.engines.attempt import Attempt


def test_a_fault_is_kept_as_text():
    with Attempt("odd") as attempt:
        raise IndexError("a fault of ours")
    assert attempt.fault == "it failed: IndexError: a fault of ours"


@pytest.mark.parametrize("raised", [KeyboardInterrupt, GeneratorExit, SystemExit])
def test_what_is_no_fault_goes_through(raised):
    with pytest.raises(raised), Attempt("odd"):
        raise raised
