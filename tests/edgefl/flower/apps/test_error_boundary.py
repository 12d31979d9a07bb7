"""A failure of edgefl is reported as such; one in code that only observes is suppressed and logged once."""

import logging
import sys

import pytest

from edgefl.errors import ConfigError, EdgeflError
from edgefl.flower.apps.error_boundary import BestEffort, ErrorBoundary, describe, is_own_fault
from edgefl.simulation.screen.live import size_text
from edgefl.terminal import debug


def users(call):
    return call()


def raised_by(call):
    with pytest.raises((TypeError, ValueError)) as told:
        users(call)
    return told.value


def test_the_deepest_frame_outside_libraries_decides():
    ours = raised_by(lambda: size_text("x"))
    assert is_own_fault(ours)
    assert "live.py:" in describe(ours)
    theirs = raised_by(lambda: users(lambda: int("x")))
    assert not is_own_fault(theirs)
    assert "test_error_boundary.py:" in describe(theirs)


def test_an_error_raised_on_purpose_is_no_fault():
    boundary = ErrorBoundary()
    with pytest.raises(ConfigError), boundary:
        raise ConfigError("no such node")
    boundary.raise_fault("app")


def test_a_boundary_passes_faults_on_and_records_the_first():
    boundary = ErrorBoundary()
    for wrong in ("x", None):
        with pytest.raises(TypeError), boundary:
            size_text(wrong)
    with pytest.raises(EdgeflError, match="a fault of edgefl itself, not of app: TypeError") as told:
        boundary.raise_fault("app")
    assert told.value.__cause__ is boundary.fault
    with pytest.raises(KeyboardInterrupt), boundary:
        raise KeyboardInterrupt


@pytest.mark.parametrize("stacks", ["0", "1"])
def test_best_effort_suppresses_faults_and_logs_the_first(caplog, monkeypatch, stacks):
    monkeypatch.setenv(debug.VARIABLE, stacks)
    best_effort = BestEffort("what is counted")
    for _ in range(3):
        with best_effort:
            size_text("x")
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "not of the app; the run continues, but what is counted may be incomplete: TypeError" in record.getMessage()
    assert bool(record.exc_info) == (stacks == "1")
    with pytest.raises(SystemExit), best_effort:
        sys.exit(1)
