"""The Python reference: the public names of `edgefl` and `edgefl.flower`, grouped; mkdocstrings describes each."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping

import edgefl
import edgefl.errors
import edgefl.flower
from docs.generate.markdown import fenced

HEAD = """# Python API

Every name on this page can be imported from `edgefl`, those of Flower apps from `edgefl.flower`. Each is loaded when
it is first used, so `import edgefl` takes no time. All other modules may change from one version to the next.
"""
GROUPS: Mapping[str, tuple[str, ...]] = {
    "Tasks": ("Task", "FitResult", "EvalResult", "WholeSet"),
    "On a fleet": ("run", "RunResult", "RoundReport"),
    "Simulations": (
        "simulate", "SimulationResult", "Watching", "sweep", "SweepResult", "VariantResult", "Variant",
        "SweepWatching",
    ),
    "Configuration": (
        "load_config", "JobConfig", "RoundsConfig", "StopConfig", "TrainConfig", "SplitConfig", "ServerConfig",
        "AggregationConfig",
        "TiersConfig",
        "SimulationConfig", "PopulationConfig", "DevicesConfig", "AvailabilityConfig", "Spread", "EngineConfig",
    ),
}  # fmt: skip
FLOWER_RESULT = "FlowerRunResult"


def errors() -> list[str]:
    """Return the public names that are in no group: the errors."""
    grouped = {FLOWER_RESULT, *(name for names in GROUPS.values() for name in names)}
    return [name for name in edgefl.__all__ if name not in grouped]


def page() -> str:
    """Return the page."""
    return "\n\n".join(_parts()) + "\n"


def _parts() -> Iterator[str]:
    yield HEAD
    for title, names in GROUPS.items():
        yield f"## {title}"
        if title == "Configuration":
            yield "[Configuration](configuration.md) describes each key."
        yield from (f"::: edgefl.{name}" for name in names)
    yield "## Flower apps"
    yield from (f"::: edgefl.flower.{name}" for name in edgefl.flower.__all__)
    yield "## Errors"
    tree = inspect.cleandoc(edgefl.errors.__doc__ or "").split("\n\n")
    yield tree[0]
    yield fenced(inspect.cleandoc(tree[1]), "text")
    yield tree[2]
    yield from (f"::: edgefl.{name}" for name in errors())
