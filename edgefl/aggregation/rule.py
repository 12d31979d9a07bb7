"""The interface of aggregation rules."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from edgefl.records import Partial, Update
from edgefl.trees import Tree


class Rule(Protocol):
    """Turns admitted updates into one aggregated update. Its flags say what it supports; config checks them."""

    streams: bool  # keeps no update after `add`
    merges: bool  # partial sums of regions give the same result as all updates at once

    def add(self, update: Update) -> None:
        """Fold one update that a guard has admitted."""

    def merge(self, partial: Partial) -> None:
        """Fold a region's partial sum."""

    def result(self) -> Tree:
        """Return the aggregated update, in the dtypes and shapes of the parameters."""


class RuleKind(Protocol):
    """A rule by its class: what it can do is known before one is made."""

    @property
    def streams(self) -> bool: ...
    @property
    def merges(self) -> bool: ...
    def __call__(self, like: Tree, /) -> Rule: ...


@runtime_checkable
class Merging(Rule, Protocol):
    """What a rule that merges has in addition: the sum so far, for the next tier."""

    def partial(self) -> Partial:
        """Return a weighted sum in float64, which `merge` accepts."""

    def partial_mean(self) -> Partial:
        """Return the sum as it travels between tiers: as a weighted mean, which `merge` accepts. Ends the rule."""
