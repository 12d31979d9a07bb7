"""What the auditor knows of regional rounds: which models of regions follow from their devices' updates.

A region averages its devices k times for each round of the cloud (HierFAVG, Liu et al. 2020, Algorithm 1): a device's
last update moves the region's model, of which nobody says who is in it. So each model that a device has trained on is
looked for among the means of all subsets of the updates before it; fleets of simulations are small.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

TOLERANCE = 1e-6
_MOST = 5000  # combinations of models that are looked through

Model = Mapping[str, np.ndarray]
Entry = Mapping[str, Any]  # of the log


class RegionalRounds:
    """The regional rounds of one round of the cloud, by what its devices trained."""

    def __init__(self, log: Sequence[Entry], number: int, times: int, before_name: str, before: Model) -> None:
        self._before, self.wrong = before, list[str]()
        first, self.last = (number - 1) * times + 1, number * times
        of_round = [one for one in log if one["kind"] in {"started", "trained"} and first <= one["round"] <= self.last]
        trained = [one for one in of_round if one["kind"] == "trained"]
        began = [one for one in of_round if one["kind"] == "started" and one["round"] > first]
        models = {one["base"]: _values(one["base_values"], before) for one in began}
        known: dict[str, Model] = {before_name: before}
        self.counted: set[tuple[str, int]] = set()  # devices, and regional rounds whose models they are in
        for regional in range(first, self.last):
            sent = [one for one in trained if one["round"] == regional and one["base"] in known]
            following = dict(known)  # of regions that got no update
            for name, values in models.items():
                if name not in known and (found := _explained(values, known, sent)) is not None:
                    following[name] = values
                    self.counted |= {(device, regional) for device in found}
            known = following
            odd = {one["base"] for one in began if one["round"] == regional + 1} - known.keys()
            self.wrong += [f"regional round {regional + 1}: {name[:12]} is no mean of a region's updates"
                           for name in sorted(odd)]  # fmt: skip
        self._known = known
        self._updates: dict[str, list[Entry]] = {}
        for one in trained:
            if one["round"] == self.last and one["base"] in known:
                self._updates.setdefault(one["device"], []).append(one)

    @property
    def devices(self) -> set[str]:
        """Who trained in the last regional round on a model that is explained."""
        return set(self._updates)

    def weight(self, devices: Iterable[str]) -> float:
        """Return the weight of devices: that of their last updates."""
        return float(sum(self._updates[device][0]["weight"] for device in devices))

    def means(self, devices: Sequence[str]) -> Iterator[Model]:
        """Yield the mean changes that these devices can have made: more than one, if one trained on two models."""
        every = (self._updates[device] for device in devices)
        for chosen in itertools.islice(itertools.product(*every), _MOST):
            weight = sum(one["weight"] for one in chosen)
            yield {
                name: sum(
                    one["weight"] * (self._known[one["base"]][name].astype(np.float64) - old + one["update"][name])
                    for one in chosen
                ) / weight
                for name, old in self._before.items()
            }  # fmt: skip


def _explained(values: Model, known: Mapping[str, Model], sent: Sequence[Entry]) -> set[str] | None:
    """Return a set of devices whose mean update leads to these values; None if there is none."""
    for name, base in known.items():
        updates = {one["device"]: one for one in sent if one["base"] == name}
        for size in range(len(updates), -1, -1):
            for devices in itertools.combinations(sorted(updates), size):
                if _leads(base, [updates[one] for one in devices], values):
                    return set(devices)
    return None


def _leads(base: Model, updates: Sequence[Entry], values: Model) -> bool:
    weight = sum(one["weight"] for one in updates) or 1.0
    for name, old in base.items():
        total = sum((one["weight"] * np.array(one["update"][name]) for one in updates), np.zeros(old.shape))
        wanted = old.astype(np.float64) + total / weight
        if not np.allclose(wanted, values[name], rtol=TOLERANCE, atol=TOLERANCE):
            return False
    return True


def _values(lists: Mapping[str, Any], like: Model) -> Model:
    return {name: np.array(lists[name], old.dtype) for name, old in like.items()}
