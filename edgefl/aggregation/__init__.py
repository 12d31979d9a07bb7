"""Aggregation rules by short name. Each rule is one file with its paper at the head.

A rule's class says what it supports (`streams`, `merges`), so that a configuration is checked, and an engine chosen,
before any rule is made.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgefl.aggregation.mean import WeightedMean
from edgefl.aggregation.rule import Rule, RuleKind
from edgefl.aggregation.server_opt import ServerOptimizer
from edgefl.choosing.combined import LATE_NEXT, LATE_REFUSE
from edgefl.config import JobConfig
from edgefl.errors import ConfigError
from edgefl.trees import Tree

__all__ = ["RULES", "Rule", "RuleKind", "WeightedMean", "check_rule", "make_rule", "refuse_unusable", "rule_kind"]

RULES: Mapping[str, RuleKind] = {"mean": WeightedMean}


def rule_kind(name: str) -> RuleKind:
    """Return the rule of that name and what it can do; raises ConfigError for an unknown name."""
    if name not in RULES:
        raise ConfigError(f"aggregation.rule={name!r} is not one of: {', '.join(sorted(RULES))}")
    return RULES[name]


def check_rule(config: JobConfig) -> None:
    """Raise ConfigError for an unknown rule, and for one that cannot do what the other settings ask of it."""
    name = config.aggregation.rule
    if config.rounds.late == LATE_NEXT and not rule_kind(name).merges:
        raise ConfigError(
            f"rounds.late={LATE_NEXT!r}: the rule {name!r} compares updates of one version, and takes none of another. "
            f"Use rule='mean', or rounds.late={LATE_REFUSE!r}"
        )
    tiers = config.tiers
    if not rule_kind(name).merges and (tiers.region_rounds > 1 or tiers.fan_out):
        asked = f"tiers.region_rounds={tiers.region_rounds}" if tiers.region_rounds > 1 else "tiers.fan_out"
        raise ConfigError(
            f"aggregation.rule={name} needs each update by itself, and with {asked} regions send sums of updates. "
            "Leave out the section [tiers], or use aggregation.rule=mean"
        )


def refuse_unusable(config: JobConfig) -> None:
    """Raise ConfigError for a rule or a server optimizer that no round could use; MissingExtra without torch."""
    check_rule(config)
    ServerOptimizer(config.server, gradient=False)


def make_rule(name: str, like: Tree) -> Rule:
    """Make the rule with this name, for trees like `like`; raises ConfigError for an unknown name."""
    return rule_kind(name)(like)
