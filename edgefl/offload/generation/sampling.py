"""The choice of the next token from logits: greedy, or by temperature and nucleus (Holtzman et al. 2020, top-p).

The random number of a choice depends on the seed and the token's position alone (Philox, Salmon et al. 2011, a
counter-based generator). So a sequence that is computed again from its tokens continues with the same choices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from edgefl.errors import ProtocolError
from edgefl.trees import Array

MAX_TEMPERATURE = 2.0
MAX_SEED = (1 << 63) - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are chosen; raises ProtocolError for values out of range."""

    temperature: float = 0.0  # 0 = the most likely token
    top_p: float = 1.0  # only the most likely tokens that together have this probability
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= MAX_TEMPERATURE):
            raise ProtocolError(f"temperature {self.temperature} must be from 0 to {MAX_TEMPERATURE:g}")
        if not 0 < self.top_p <= 1:
            raise ProtocolError(f"top_p {self.top_p} must be above 0 and at most 1")
        if not 0 <= self.seed <= MAX_SEED:
            raise ProtocolError(f"seed {self.seed} must be from 0 to {MAX_SEED}")


def choose(logits: Array, sampling: Sampling, position: int) -> int:
    """Return the token at `position` of a sequence, from logits (V,); raises ProtocolError unless all are finite."""
    if not np.isfinite(logits).all():
        raise ProtocolError("the logits are not finite: the activations that led to them are damaged")
    if sampling.temperature == 0:
        return int(logits.argmax())
    weights = np.exp((logits - logits.max()).astype(np.float64) / sampling.temperature)
    order = np.argsort(-weights, kind="stable")
    sums = np.cumsum(weights[order])
    kept = int(np.searchsorted(sums, sampling.top_p * sums[-1])) + 1  # the last one completes the share
    kept = min(kept, len(sums))
    drawn = _uniform(sampling.seed, position) * sums[kept - 1]
    return int(order[min(int(np.searchsorted(sums[:kept], drawn, side="right")), kept - 1)])


def _uniform(seed: int, position: int) -> float:
    """Return a number in [0, 1) that depends on both alone."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=position)).random())
