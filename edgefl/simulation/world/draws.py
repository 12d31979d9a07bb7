"""Seeded draws by key: the draw for (seed, stream, client) needs no state and no earlier draws.

So a population is lazy: client 999,999 costs as much as client 0. A stream has a name of several
parts (`"speed"`, `"drop-out", 12`), hashed by SHA-256; within it the index is mixed by splitmix64
(Steele et al. 2014), so that a million draws are a few numpy operations.
Invariant: a draw depends only on its seed, stream and index; it is the same in every process.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from edgefl.errors import ConfigError

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

KINDS = ("constant", "uniform", "normal", "lognormal")

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIXERS = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))
_BITS = 2**64 - 1
_STANDARD = NormalDist()


def stream_key(seed: int, *stream: object) -> int:
    """Return 64 bits for a stream; also usable as a seed for `numpy.random.default_rng`."""
    return int.from_bytes(hashlib.sha256(repr((seed, *stream)).encode()).digest()[:8])


def uniforms(indices: Indices, seed: int, *stream: object) -> Floats:
    """Return a number in the open interval (0, 1) for each index."""
    mixed = np.asarray(indices).astype(np.uint64) * _GOLDEN + np.uint64(
        stream_key(seed, *stream)
    )  # wraps on purpose: it is a hash
    for shift, factor in _MIXERS:
        mixed = (mixed ^ (mixed >> shift)) * factor
    mixed ^= mixed >> np.uint64(31)
    return ((mixed >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def uniform(index: int, seed: int, *stream: object) -> float:
    """Return the same as `uniforms` for one index, at a tenth of the cost."""
    mixed = (index * int(_GOLDEN) + stream_key(seed, *stream)) & _BITS
    for shift, factor in _MIXERS:
        mixed = ((mixed ^ (mixed >> int(shift))) * int(factor)) & _BITS
    mixed ^= mixed >> 31
    return ((mixed >> 11) + 0.5) * 2.0**-53


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """The distribution of a quantity over devices, or over a device's rounds.

    constant: `mean`; uniform: from `min` to `max`; normal and lognormal: with this `mean` and `std` (of the
    quantity itself, not of its logarithm). Values outside `min`..`max` are clipped.
    """

    kind: str = "constant"  # constant | uniform | normal | lognormal
    mean: float = 0.0  # constant, normal and lognormal
    std: float = 0.0  # normal and lognormal
    min: float = 0.0  # the smallest value
    max: float = math.inf  # the largest value

    def __post_init__(self) -> None:
        told = (
            f"a spread of kind={self.kind!r}, mean={self.mean:g}, std={self.std:g}, min={self.min:g}, max={self.max:g}"
        )
        if self.kind not in KINDS:
            raise ConfigError(f"{told}: kind must be one of: {', '.join(KINDS)}")
        if not (math.isfinite(self.mean) and self.mean >= 0 and math.isfinite(self.std) and self.std >= 0):
            raise ConfigError(f"{told}: mean and std must be 0 or more, and finite")
        if not 0 <= self.min <= self.max or math.isinf(self.min):
            raise ConfigError(f"{told}: 0 <= min <= max must hold")
        if self.kind == "uniform" and math.isinf(self.max):
            raise ConfigError(f"{told}: uniform needs a finite max")
        if self.kind == "lognormal" and self.mean == 0:
            raise ConfigError(f"{told}: the mean of a lognormal must be above 0")

    @property
    def lowest(self) -> float:
        """The smallest possible value."""
        return max(self.min, self.mean) if self.kind == "constant" else self.min

    def quantile(self, share: float) -> float:
        """Return the value below which this fraction of draws, in (0, 1), lies."""
        return min(max(self._uncut(share), self.min), self.max)

    def _uncut(self, share: float) -> float:
        if self.kind == "uniform":
            return self.min + share * (self.max - self.min)
        if self.kind == "constant" or self.std == 0:
            return self.mean
        if self.kind == "normal":
            return self.mean + self.std * _STANDARD.inv_cdf(share)
        log_variance = math.log1p((self.std / self.mean) ** 2)
        centre = math.log(self.mean) - log_variance / 2
        return math.exp(centre + math.sqrt(log_variance) * _STANDARD.inv_cdf(share))
