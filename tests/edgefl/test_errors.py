"""The error tree: one base, the drawing in the docstring is the tree, messages say what to do."""

from __future__ import annotations

import inspect

import pytest

from edgefl import errors
from edgefl.errors import EdgeflError, MissingExtra, UpdateRejected
from edgefl.terminal.extras import install_command

ALL = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]


@pytest.mark.parametrize("kind", ALL)
def test_every_error_is_in_the_one_tree(kind: type[Exception]) -> None:
    assert issubclass(kind, EdgeflError)


@pytest.mark.parametrize("kind", ALL)
def test_the_docstring_draws_every_error(kind: type[Exception]) -> None:
    assert kind.__name__ in (errors.__doc__ or "")


def test_errors_are_also_what_python_calls_them() -> None:
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.ProtocolError, ValueError)
    assert issubclass(MissingExtra, ImportError)


def test_missing_extra_says_the_line_that_brings_it() -> None:
    assert str(MissingExtra("training", "train")) == f"training needs the [train] extra: {install_command('train')}"


def test_update_rejected_keeps_device_and_reason() -> None:
    error = UpdateRejected("a", "weight 0")
    assert (error.device, error.reason) == ("a", "weight 0")
    assert "'a'" in str(error)
    assert "weight 0" in str(error)


def test_out_of_memory_is_known_whoever_noticed_it() -> None:
    wrapped = ValueError("x")
    wrapped.__cause__ = MemoryError()
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: you tried to allocate 8 bytes"), wrapped):
        assert errors.out_of_memory(error)
    assert not errors.out_of_memory(ValueError("x"))
