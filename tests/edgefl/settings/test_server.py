"""Settings of the server's step, the rule and the tiers: what cannot be is refused by name."""

from __future__ import annotations

import pytest

from edgefl.config import JobConfig, load_config
from edgefl.errors import ConfigError


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("server.lr=inf", "server.lr=inf"),
        ("server.lr=-0.0", "server.lr=-0.0"),
        ("server.options.momentum=nan", "server.options.momentum=nan"),
        ("server.options.momentum=1979-05-27", "server.options.momentum=datetime.date"),
        ("server.options.betas=[0.9, inf]", "server.options.betas=inf"),
        ("server.options.a.b=1", "server.options.a={'b': 1}"),
        ("server.optimizer=A\ud800", r"server.optimizer='A\ud800' must be printable"),
        ("aggregation.rule=mean\x1b[2J", "aggregation.rule="),
        ("server.fragments=0", "server.fragments=0 must be 1 or more, and at most 1000"),
        ("server.wire=int8", "server.wire='int8' is not one of: exact, bf16"),
        ("server.wire=b\x1bf16", "server.wire='b\\x1bf16' is not one of"),
        ("tiers.region_rounds=0", "tiers.region_rounds=0 must be 1 or more"),
        ("tiers.fan_out=[2, 0]", "tiers.fan_out=0 must be 1 or more"),
        ("tiers.fan_out=[1, 1, 1, 1, 1, 1, 1, 1, 1]", "tiers.fan_out has 9 tiers, at most 8"),
        ("tiers.uplink_mbps=[1.0, 2.0]", "tiers.uplink_mbps has 2 values for 0 tiers of tiers.fan_out"),
        ("tiers.rtt_s=[-1.0]", "tiers.rtt_s=-1.0 must be 0 or more"),
        ("tiers.downlink_mbps=[0.0]", "tiers.downlink_mbps=0.0 must be 1e-06 or more"),
    ],
)
def test_what_cannot_be_is_refused_by_name(setting: str, message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_config(JobConfig, settings=[setting])
    str(refusal.value).encode()  # or no terminal and no log could show it
    assert message in str(refusal.value)
