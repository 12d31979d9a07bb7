"""Aggregation rules by short name. Each rule is one file, which cites its paper in the module docstring."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from edgefl.aggregation.mean import WeightedMean
from edgefl.aggregation.rule import Rule
from edgefl.errors import ConfigError
from edgefl.trees import Tree

__all__ = ["RULES", "Rule", "WeightedMean", "make_rule"]

RULES: Mapping[str, Callable[[Tree], Rule]] = {"mean": WeightedMean}


def make_rule(name: str, like: Tree) -> Rule:
    """Make the rule with this name, for trees like `like`; raises ConfigError for an unknown name."""
    if name not in RULES:
        raise ConfigError(f"aggregation.rule={name!r} is not one of: {', '.join(sorted(RULES))}")
    return RULES[name](like)
