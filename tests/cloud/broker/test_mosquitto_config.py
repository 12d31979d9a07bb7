"""The mosquitto configuration: what is documented is what is generated, and its rights are ours."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from cloud.broker.mosquitto_config import ACL_FILE, CONFIG_FILE, broker_acl, broker_config, write_broker_config
from edgefl.errors import ConfigError
from edgefl.protocols import topics

DEPLOY = Path(__file__).parents[3] / "deploy" / "mosquitto"


def test_the_documented_example_is_what_is_generated() -> None:
    assert (DEPLOY / CONFIG_FILE).read_text() == broker_config(Path("/etc/mosquitto/edgefl"), "0.0.0.0", 8883)  # noqa: S104
    assert (DEPLOY / ACL_FILE).read_text() == broker_acl()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed here")
def test_systemd_accepts_the_units_that_have_mosquitto_read_its_list_again() -> None:
    units = [path for path in DEPLOY.iterdir() if path.name.startswith("edgefl-")]
    done = subprocess.run(
        ["systemd-analyze", "verify", *units], capture_output=True, text=True, timeout=60, check=False
    )
    assert len(units) == 4
    assert (done.returncode, done.stderr) == (0, "")


def test_both_files_are_written(tmp_path: Path) -> None:
    path = write_broker_config(tmp_path, "127.0.0.1", 1234)
    assert path.read_text() == broker_config(tmp_path, "127.0.0.1", 1234)
    assert (tmp_path / ACL_FILE).read_text() == broker_acl()


def test_a_relative_folder_is_refused() -> None:
    with pytest.raises(ConfigError, match="absolute"):
        broker_config(Path("here"), "127.0.0.1", 8883)


def test_the_acl_gives_a_device_what_topics_allow_and_no_more() -> None:
    lines = [line.replace("%u", "cam-1").split() for line in broker_acl().splitlines() if line.startswith("pattern")]
    writes = {topic for _, way, topic in lines if way == "write"}
    reads = {topic for _, way, topic in lines if way == "read"}
    assert writes == {topics.up("cam-1", kind) for kind in topics.UP_KINDS}
    assert all(topics.allowed("cam-1", topic, publish=True) for topic in writes)
    assert all(topics.allowed("cam-1", topic, publish=False) for topic in reads)
    assert reads == {"edgefl/v1/down/cam-1/#"}
