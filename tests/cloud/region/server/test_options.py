"""The options of a region: which broker, and where it is."""

import pytest

from cloud.region.server.options import RegionOptions
from edgefl.errors import ConfigError


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "mqtts://127.0.0.1:8883"),
        ("0.0.0.0", "mqtts://127.0.0.1:8883"),  # noqa: S104 - not bound
        ("::", "mqtts://[::1]:8883"),
        ("10.0.0.5", "mqtts://10.0.0.5:8883"),
        ("fd00::5", "mqtts://[fd00::5]:8883"),
    ],
)
def test_where_a_region_reaches_its_own_broker(tmp_path, host, url):
    assert RegionOptions(home=tmp_path, host=host).broker_here == url


@pytest.mark.parametrize("broker", ["mqtts://other:8883", "mosquitto", ""])
def test_a_region_runs_its_broker_itself(tmp_path, broker):
    with pytest.raises(ConfigError, match="expected embedded or builtin: a region runs its own broker"):
        RegionOptions(home=tmp_path, broker=broker)
    assert RegionOptions(home=tmp_path, broker="builtin").broker == "builtin"
