"""Which devices a job reaches: a rule that needs each update takes none from a region, and says so at the start."""

from __future__ import annotations

import pytest

from cloud.jobs.reach import refuse_sums, unreachable
from edgefl.aggregation import RULES, WeightedMean, refuse_unusable
from edgefl.config import JobConfig, from_dict
from edgefl.errors import ConfigError


class EachUpdate(WeightedMean):
    """A rule that needs each update by itself."""

    merges = False


@pytest.fixture(autouse=True)
def _each(monkeypatch):
    monkeypatch.setitem(RULES, "each", EachUpdate)


def config(rule="each", quorum=1, **tiers):
    return from_dict(JobConfig, {"aggregation": {"rule": rule}, "rounds": {"quorum": quorum}, "tiers": tiers})


def test_which_devices_a_job_reaches():
    assert unreachable(config("mean"), "") == unreachable(config("mean"), "oslo") == unreachable(config(), "") == ""
    assert "through region oslo, and aggregation.rule=each needs each update" in unreachable(config(), "oslo")
    regional = config("mean", region_rounds=3)
    assert unreachable(regional, "oslo") == ""
    assert unreachable(regional, "") == "it is connected to the cloud itself, and tiers.region_rounds=3 needs a region"


def test_a_rule_that_needs_each_update_is_refused_where_regions_leave_it_too_few():
    online = {"a": "oslo", "b": "oslo", "c": ""}
    with pytest.raises(ConfigError, match=r"2 of 3 online devices are connected through regions \(a, b\); 1 are left "
                                          r"for rounds.quorum=2. Use aggregation.rule=mean, or assign"):  # fmt: skip
        refuse_sums(config(quorum=2), online)
    refuse_sums(config(quorum=1), online)
    refuse_sums(config("mean", quorum=2), online)
    refuse_sums(config(quorum=2), {})  # devices may still come
    with pytest.raises(ConfigError, match=r"\(d0, d1, d2, d3, d4 and 2 more\)"):
        refuse_sums(config(), {f"d{number}": "oslo" for number in range(7)})


@pytest.mark.parametrize(
    ("tiers", "named"), [({"region_rounds": 2}, "tiers.region_rounds=2"), ({"fan_out": [2]}, "tiers.fan_out")]
)
def test_sums_of_regions_and_such_a_rule_exclude_each_other(tiers, named):
    with pytest.raises(ConfigError, match=f"aggregation.rule=each needs each update by itself, and with {named}"):
        refuse_unusable(config(**tiers))
    refuse_unusable(config("mean", **tiers))
