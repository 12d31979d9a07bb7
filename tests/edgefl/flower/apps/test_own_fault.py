"""Ours are told as ours; what only looks on is stopped and logged once."""

import logging
import sys

import pytest

from edgefl.errors import ConfigError, EdgeflError
from edgefl.flower.apps.own_fault import Border, Bystander, is_ours, said
from edgefl.simulation.screen.live import size_text
from edgefl.terminal import debug


def users(call):
    return call()


def raised_by(call):
    with pytest.raises((TypeError, ValueError)) as told:
        users(call)
    return told.value


def test_the_deepest_code_that_is_no_librarys_decides():
    ours = raised_by(lambda: size_text("x"))
    assert is_ours(ours)
    assert "live.py:" in said(ours)
    theirs = raised_by(lambda: users(lambda: int("x")))
    assert not is_ours(theirs)
    assert "test_own_fault.py:" in said(theirs)


def test_what_we_raise_on_purpose_is_no_fault():
    border = Border()
    with pytest.raises(ConfigError), border:
        raise ConfigError("no such node")
    border.raise_fault("app")


def test_a_border_lets_a_fault_through_and_keeps_the_first():
    border = Border()
    for wrong in ("x", None):
        with pytest.raises(TypeError), border:
            size_text(wrong)
    with pytest.raises(EdgeflError, match="a fault of edgefl itself, not of app: TypeError") as told:
        border.raise_fault("app")
    assert told.value.__cause__ is border.fault
    with pytest.raises(KeyboardInterrupt), border:
        raise KeyboardInterrupt


@pytest.mark.parametrize("stacks", ["0", "1"])
def test_a_bystander_logs_the_first_and_stops_them_all(caplog, monkeypatch, stacks):
    monkeypatch.setenv(debug.VARIABLE, stacks)
    watching = Bystander("what is counted")
    for _ in range(3):
        with watching:
            size_text("x")
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "not of the app; the run continues, but what is counted may be incomplete: TypeError" in record.getMessage()
    assert bool(record.exc_info) == (stacks == "1")
    with pytest.raises(SystemExit), watching:
        sys.exit(1)
