"""Several rounds in a region for each round of the cloud: HierFAVG (Liu et al. 2020, Algorithm 1).

A region begins with the cloud's parameters, averages its own devices k times, and returns the whole change with the
weight of its last round. With k = 1 this is the flat weighted mean.
"""

from __future__ import annotations

import numpy as np

from edgefl.aggregation.server_opt import ServerOptimizer
from edgefl.settings.server import ServerConfig
from edgefl.trees import Array, Tree


def regional_round(number: int, regional: int, region_rounds: int) -> int:
    """Return the number of a device's round: the `regional`-th (from 0) of a region in the cloud's round `number`."""
    return (number - 1) * region_rounds + regional + 1


def regional_step(parameters: Tree, mean: Tree) -> Tree:
    """Return a region's parameters after one of its rounds: the mean change is added, as plain FedAvg does."""
    return ServerOptimizer(ServerConfig(), gradient=False).step(parameters, mean)


def change(first: Tree, last: Tree) -> dict[str, Array]:
    """Return `last` - `first` in float64."""
    return {name: np.subtract(last[name], array, dtype=np.float64) for name, array in first.items()}
