"""Which devices a job reaches through the tiers, and why not the others.

Regions send one sum for all of their devices, so a rule that needs each update by itself (a median, Krum) cannot use
devices below them; and regional rounds are those of regions, so they cannot use devices that have none.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgefl.aggregation import rule_kind
from edgefl.config import JobConfig
from edgefl.errors import ConfigError

MAX_SHOWN = 5


def unreachable(config: JobConfig, region: str) -> str:
    """Return why a job cannot use a device that is connected through a region; empty = it can.

    `region` is empty for a device that is connected to the cloud itself. Raises ConfigError for an unknown rule.
    """
    rule, times = config.aggregation.rule, config.tiers.region_rounds
    if region and not rule_kind(rule).merges:
        return f"it is connected through region {region}, and aggregation.rule={rule} needs each update by itself"
    if not region and times > 1:
        return f"it is connected to the cloud itself, and tiers.region_rounds={times} needs a region"
    return ""


def refuse_sums(config: JobConfig, regions: Mapping[str, str]) -> None:
    """Raise ConfigError if a job starts whose rule can use too few of the devices that are online.

    `regions` says of each of them through which region it is connected; empty = directly.
    """
    rule, quorum = config.aggregation.rule, config.rounds.quorum
    if rule_kind(rule).merges:
        return
    inside = sorted(device for device, region in regions.items() if region)
    num_direct = len(regions) - len(inside)
    if inside and num_direct < quorum:
        shown = ", ".join(inside[:MAX_SHOWN]) + (f" and {len(inside) - MAX_SHOWN} more" if inside[MAX_SHOWN:] else "")
        raise ConfigError(
            f"aggregation.rule={rule} needs each update by itself, and a region sends one sum for its devices; "
            f"{len(inside)} of {len(regions)} online devices are connected through regions ({shown}); {num_direct} are "
            f"left for rounds.quorum={quorum}. Use aggregation.rule=mean, or assign devices to the cloud itself: "
            f"`edgefl devices assign PATTERN --parents cloud`"
        )
