"""Which cut, and in which wire format: predictions of all options by one scan over the cuts, and the choice.

Of an option with k layers on the device, for one request:

    latency = sum of the first k layers on the device + sum of the others in the cloud
              + encoding + bytes up / rate + round trip + bytes down / rate + decoding    (if anything is in the cloud)

The sums are running sums, so the scan costs one addition per layer and is exact over all prefixes of the layers
(Kang et al. 2017, Neurosurgeon). A minimum cut finds splits that are no prefix of the file's order, too (Hu et al.
2019, DADS), but cannot have a limit of memory. No I/O and no measurement is in here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from edgefl.errors import ConfigError
from edgefl.offload.plans.link import LinkSpeed

NOTHING, ACTIVATIONS, INPUTS = "nothing", "activations", "inputs"  # what leaves the device, in growing order
LEAVES = (NOTHING, ACTIVATIONS, INPUTS)
ALL_DEVICE, ALL_CLOUD = "all on the device", "all in the cloud"


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitOption:
    """A cut with a wire format: what can be chosen."""

    name: str  # of the cut, or ALL_DEVICE or ALL_CLOUD
    num_head: int  # layers on the device
    form: str  # wire format; empty if nothing crosses
    up_bytes: int
    down_bytes: int
    encode_ms: float  # on this machine; a device takes as many times longer as for its layers
    decode_ms: float  # in the cloud
    device_bytes: int  # weights and activations at once
    leaves: str  # one of LEAVES


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What one request costs with an option."""

    option: SplitOption
    device_ms: float  # with encoding
    link_ms: float  # both ways, with the round trip
    busy_ms: float  # of the link, without the round trip: then the next request can be sent
    cloud_ms: float  # with decoding

    @property
    def latency_ms(self) -> float:
        return self.device_ms + self.link_ms + self.cloud_ms

    @property
    def per_s(self) -> float:
        """Requests a second when device, link and cloud each work on another one."""
        slowest = max(self.device_ms, self.busy_ms, self.cloud_ms)
        return 1e3 / slowest if slowest else math.inf

    def as_json(self) -> dict[str, object]:
        return {
            "cut": self.option.name,
            "format": self.option.form,
            "device_layers": self.option.num_head,
            "up_bytes": self.option.up_bytes,
            "down_bytes": self.option.down_bytes,
            "device_ms": self.device_ms,
            "link_ms": self.link_ms,
            "cloud_ms": self.cloud_ms,
            "latency_ms": self.latency_ms,
            "per_s": self.per_s,
            "device_bytes": self.option.device_bytes,
            "leaves": self.option.leaves,
        }


# What a plan makes small; equal options are ordered by their latency.
OBJECTIVES: Mapping[str, Callable[[Prediction], float]] = {
    "latency": lambda one: one.latency_ms,
    "throughput": lambda one: -one.per_s,
    "memory": lambda one: one.option.device_bytes,
    "cloud-cost": lambda one: one.cloud_ms,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanLimits:
    """What an option must keep within."""

    memory_bytes: float = math.inf  # on the device
    may_leave: str = INPUTS  # and what comes before it in LEAVES
    latency_ms: float = math.inf

    def __post_init__(self) -> None:
        if self.may_leave not in LEAVES:
            raise ConfigError(f"--may-leave {self.may_leave!r} is not one of: {', '.join(LEAVES)}")

    def refusal(self, one: Prediction) -> str:
        """Return in words what an option exceeds; empty if it is within the limits."""
        if one.option.device_bytes > self.memory_bytes:
            return f"memory: {one.option.device_bytes} bytes"
        if LEAVES.index(one.option.leaves) > LEAVES.index(self.may_leave):
            return f"{one.option.leaves} would leave"
        return "latency" if one.latency_ms > self.latency_ms else ""


def predict(
    options: Iterable[SplitOption], device_ms: Sequence[float], cloud_ms: Sequence[float], link: LinkSpeed,
    *, encoding_factor: float = 1.0,
) -> list[Prediction]:  # fmt: skip
    """Return what each option costs; `device_ms` and `cloud_ms` are of each layer, in order.

    `encoding_factor` says how many times slower a device encodes than this machine.
    """
    heads = [0.0, *accumulate(device_ms)]
    tails = [*list(accumulate(reversed(cloud_ms)))[::-1], 0.0]
    found = []
    for one in options:
        crosses = bool(one.form)
        busy_ms = link.upload_ms(one.up_bytes) + link.download_ms(one.down_bytes) if crosses else 0.0
        found.append(
            Prediction(
                option=one,
                device_ms=heads[one.num_head] + one.encode_ms * encoding_factor,
                link_ms=busy_ms + link.rtt_ms if crosses else 0.0,
                busy_ms=busy_ms,
                cloud_ms=tails[one.num_head] + one.decode_ms,
            )
        )
    return found


def ranked(predictions: Iterable[Prediction], objective: str, limits: PlanLimits) -> list[Prediction]:
    """Return the options within the limits, the best first; raises ConfigError if there are none."""
    if objective not in OBJECTIVES:
        raise ConfigError(f"--objective {objective!r} is not one of: {', '.join(OBJECTIVES)}")
    everything, key = list(predictions), OBJECTIVES[objective]
    found = [one for one in everything if not limits.refusal(one)]
    if not found:
        reasons = sorted({limits.refusal(one).partition(":")[0] for one in everything})
        least = min(one.option.device_bytes for one in everything)
        raise ConfigError(
            f"no option is within the limits ({'; '.join(reasons)}): the smallest head needs {least} bytes on the "
            f"device, {limits.may_leave} may leave. Allow more with --memory, --may-leave or --within"
        )
    return sorted(found, key=lambda one: (key(one), one.latency_ms, one.option.up_bytes))
