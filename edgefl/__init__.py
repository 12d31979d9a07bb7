"""edgefl: edge-cloud federated learning. The public door; everything heavy is imported when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from edgefl.version import __version__ as __version__

if TYPE_CHECKING:
    from edgefl.config import JobConfig
    from edgefl.errors import EdgeflError
    from edgefl.operator.run import run
    from edgefl.simulation.simulate import simulate
    from edgefl.simulation.study.sweep import sweep
    from edgefl.task import FitResult, Task

__all__ = ["EdgeflError", "FitResult", "JobConfig", "Task", "run", "simulate", "sweep"]

_HOMES = {
    "EdgeflError": "edgefl.errors",
    "FitResult": "edgefl.task",
    "JobConfig": "edgefl.config",
    "Task": "edgefl.task",
    "run": "edgefl.operator.run",
    "simulate": "edgefl.simulation.simulate",
    "sweep": "edgefl.simulation.study.sweep",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgefl' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
