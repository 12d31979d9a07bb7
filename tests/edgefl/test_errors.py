"""The error tree: one base, the drawing in the docstring is of the whole package, messages say what to do."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator

import cloud
import edge_agent
import edgefl
from edgefl import errors
from edgefl.errors import EdgeflError, MissingExtra, UpdateRejected
from edgefl.terminal.extras import install_command


def modules() -> Iterator[object]:
    """Import every module of ours, but for those that are commands by themselves."""
    for package in (edgefl, cloud, edge_agent):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not info.name.endswith("__main__"):
                yield importlib.import_module(info.name)


def kinds() -> set[type[EdgeflError]]:
    """Return every error of the whole package but for those that one module keeps to itself."""
    found = {kind for module in modules() for kind in vars(module).values() if inspect.isclass(kind)}
    return {kind for kind in found if issubclass(kind, EdgeflError) and not kind.__name__.startswith("_")}


def drawn() -> dict[str, str]:
    """Return the parent of each name in the drawing."""
    parents, above = {}, {0: "EdgeflError"}
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"    ((?:\|   |    )*)[|`]-- (\w+) ", line):
            depth = len(match[1]) // 4
            parents[match[2]] = above[depth]
            above[depth + 1] = match[2]
    return parents


def test_the_docstring_draws_the_whole_packages_tree() -> None:
    tree = {kind.__name__: kind.__bases__[0].__name__ for kind in kinds() - {EdgeflError}}
    assert drawn() == tree


def test_what_a_module_keeps_to_itself_is_in_the_tree_too_or_never_leaves_it() -> None:
    ours = {
        kind for module in modules() for kind in vars(module).values()
        if inspect.isclass(kind) and issubclass(kind, BaseException)
        and kind.__module__.partition(".")[0] in {"edgefl", "cloud", "edge_agent"}
    }  # fmt: skip
    assert {kind.__name__ for kind in ours if not issubclass(kind, EdgeflError) and kind.__name__[0] != "_"} == {
        "Interrupted",  # a KeyboardInterrupt
        "Killed", "Stuck",  # of simulated programs: a simulation's own code catches them
        "RequestRefused", "SlotFull",  # the stage server answers with a status
        "QuotaExceeded", "SessionEnded",  # the training server answers with a message
        "LinkLost",  # a device connects to it again
        "ApiError", "HttpError",  # answers of a device's endpoint
        "TailFailed", "TailLost", "TailRefused", "Unanswered",  # the device falls back, tries again or answers
        "WorkerLost",  # the pool catches it and starts another worker
    }  # fmt: skip


def test_every_error_can_be_imported_from_the_door() -> None:
    assert {kind.__name__ for kind in kinds()} <= set(edgefl.__all__)
    assert all(getattr(edgefl, kind.__name__) is kind for kind in kinds())


def test_errors_are_also_what_python_calls_them() -> None:
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.ProtocolError, ValueError)
    assert issubclass(MissingExtra, ImportError)


def test_a_trainer_that_was_killed_is_no_fault_of_the_task() -> None:
    assert not issubclass(errors.TrainerLost, errors.TaskError)


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
