"""The tail's server as a process beside a cloud: what it refuses to start with. Whole runs: tests/e2e."""

from __future__ import annotations

import pytest

from cloud.generation.server import TailOptions, TailServer
from cloud.trust.own_certificates import hosts_of
from edgefl.errors import ConfigError, HomeError
from edgefl.process.home import create_home
from edgefl.protocols import tls
from tests.language_models import write_stages


@pytest.fixture
def home(tmp_path):
    create_home(tmp_path / "cloud", "cloud")
    (tmp_path / "cloud" / "tls").mkdir()
    tls.create_ca(tmp_path / "cloud" / "tls")
    return tmp_path / "cloud"


def test_folders_and_homes_that_cannot_be_served(home, tmp_path) -> None:
    write_stages(tmp_path, 2)
    with pytest.raises(ConfigError, match=r"the head of tiny .*, which ends before the last block; give the folder"):
        TailServer(TailOptions(home=home, folder=tmp_path / "head"))
    with pytest.raises(ConfigError, match="is not a stage of a language model"):
        TailServer(TailOptions(home=home, folder=tmp_path))
    create_home(tmp_path / "empty", "cloud")
    with pytest.raises(HomeError, match="has no CA yet; start its cloud first"):
        TailServer(TailOptions(home=tmp_path / "empty", folder=tmp_path / "tail"))


def test_options_that_cannot_be_used(tmp_path) -> None:
    for changes, words in (
        ({"insecure": True, "host": "10.0.0.1"}, "--insecure is for loopback only"),
        ({"join": tmp_path / "s", "engine": "numpy"}, "--engine and --memory-mb are for a process of the server's own"),
        ({"engine": "tensorflow"}, "--engine 'tensorflow' is unknown; expected auto, torch, torch:DEVICE or numpy"),
    ):
        with pytest.raises(ConfigError, match=words):
            TailOptions(home=tmp_path, folder=tmp_path, **changes)


def test_its_certificate_is_its_own_and_names_where_it_is_reached(home, tmp_path) -> None:
    write_stages(tmp_path, 2)
    TailServer(TailOptions(home=home, folder=tmp_path / "tail", names=("tail.example.org",)))
    folder = home / "stages" / "tiny"
    hosts = hosts_of(tls.load_certificate((folder / "cert.pem").read_bytes()))
    assert {"tail.example.org", "127.0.0.1", "localhost"} <= set(hosts)
    assert (folder / "key.pem").stat().st_mode & 0o777 == 0o600
