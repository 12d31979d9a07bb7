"""Draws a cohort by utility, in the manner of Oort (Lai et al., OSDI 2021): useful and fast devices first.

    utility = (samples x loss, scaled to 0..1)       what it teaches
              + sqrt(0.1 ln(round) / last round)     how stale that is
              x (T / duration)^2                     how slow it is, if it took longer than T
              x 1/2                                  for each failure in a row

A share of the cohort, 90% in the first round and falling to 20%, explores devices without an update. The others are
drawn in proportion to their utility among those above a cut-off. `fairness` f mixes in how seldom a device took part:
(1 - f) x utility + f x (most rounds - its rounds) / most rounds.

Differences from the paper: devices report their mean loss, not the root of the mean square; T is a fixed percentile of
the known durations, without a pacer; unexplored devices are drawn by lot, after those that failed least.
Invariant: a draw depends on the history, the round and the generator alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edgefl.choosing.history import History, Participation

EXPLORE_FIRST, EXPLORE_DECAY, EXPLORE_LEAST = 0.9, 0.98, 0.2
CUT_OFF = 0.95  # of the utility of the last device that would be chosen by rank
CLIP_PERCENTILE = 95.0  # an outlier's utility counts as that of this percentile
PREFERRED_PERCENTILE = 80.0  # of durations: T
SLOWNESS = 2.0  # exponent for devices slower than T
STALENESS = 0.1

Floats = npt.NDArray[np.float64]


def draw_by_utility(
    names: Sequence[str], wanted: int, history: History, *, round_number: int, fairness: float, rng: np.random.Generator
) -> list[str]:
    """Return `wanted` of the devices, in no particular order; all if there are no more."""
    if wanted >= len(names):
        return list(names)
    explored = [name for name in names if history.of(name).rounds]
    fresh = [name for name in names if not history.of(name).rounds]
    share = max(EXPLORE_LEAST, EXPLORE_FIRST * EXPLORE_DECAY ** (round_number - 1))
    num_fresh = min(len(fresh), max(round(share * wanted), wanted - len(explored)))
    drawn = _least_failed(fresh, num_fresh, history, rng)
    if num_exploited := wanted - num_fresh:
        utilities = utilities_of([history.of(name) for name in explored], round_number, fairness)
        drawn += [explored[at] for at in _above_cut_off(utilities, num_exploited, rng)]
    return drawn


def utilities_of(devices: Sequence[Participation], round_number: int, fairness: float) -> Floats:
    """Return the utility of each device, (devices,), 0 or more; each has an update."""
    losses = [one.loss for one in devices if one.loss is not None]
    usual = sum(losses) / len(losses) if losses else 1.0
    taught = np.array([(one.samples or 1.0) * (usual if one.loss is None else one.loss) for one in devices])
    taught = np.nan_to_num(np.clip(taught, 0.0, None), posinf=np.finfo(np.float64).max)
    taught = np.minimum(taught, np.percentile(taught, CLIP_PERCENTILE))
    span = float(taught.max() - taught.min())
    scaled = (taught - taught.min()) / span if span else np.ones(len(devices))
    last = np.array([max(1, one.last_round) for one in devices], np.float64)
    stale = np.sqrt(STALENESS * math.log(max(1, round_number)) / last)
    utility = (scaled + stale) * _speed(devices) * 0.5 ** np.array([min(one.failures, 60) for one in devices])
    most = max(one.rounds for one in devices)
    seldom = np.array([(most - one.rounds) / most for one in devices])
    return np.asarray((1 - fairness) * utility + fairness * seldom)


def _speed(devices: Sequence[Participation]) -> Floats:
    """Return a factor of at most 1 for each device, (devices,)."""
    known = [one.duration_s for one in devices if one.duration_s is not None]
    if not known:
        return np.ones(len(devices))
    preferred_s = max(float(np.percentile(known, PREFERRED_PERCENTILE)), 1e-9)
    durations = np.array([preferred_s if one.duration_s is None else one.duration_s for one in devices])
    return np.asarray(np.minimum(1.0, (preferred_s / np.maximum(durations, preferred_s)) ** SLOWNESS))


def _above_cut_off(utilities: Floats, wanted: int, rng: np.random.Generator) -> list[int]:
    """Return positions, drawn in proportion to their utility among those near the best."""
    ranked = np.sort(utilities)[::-1]
    candidates = np.flatnonzero(utilities >= CUT_OFF * ranked[wanted - 1])
    weights = utilities[candidates] + 1e-12 * max(1.0, float(ranked[0]))  # so that a utility of 0 can be drawn
    drawn = rng.choice(len(candidates), wanted, replace=False, p=weights / weights.sum())
    return [int(candidates[at]) for at in drawn]


def _least_failed(names: Sequence[str], wanted: int, history: History, rng: np.random.Generator) -> list[str]:
    order = rng.permutation(len(names))
    return [names[at] for at in sorted(order.tolist(), key=lambda at: history.of(names[at]).failures)[:wanted]]
