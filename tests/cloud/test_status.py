"""The status of a cloud that does not run, or does not answer; `tests/e2e/test_status.py` has one that does."""

from __future__ import annotations

import datetime

import pytest

from cloud.status import read_cloud_status
from edgefl.errors import HomeError
from edgefl.operator.credentials import write_operator_credentials
from edgefl.process.home import create_home, lock_home
from edgefl.protocols import tls


@pytest.fixture
def home(tmp_path):
    folder = tmp_path / "home"
    create_home(folder, "cloud")
    return folder


def test_a_cloud_that_has_never_run(home):
    found = read_cloud_status(home)
    assert (found.running, found.healthy, found.fault, found.url) == (False, False, "it does not run", "")
    assert (found.certificate_expires, found.ca_expires, found.devices) == ("", "", {})
    assert found.disk_free_mb > 0


def test_a_cloud_that_does_not_answer(home, free_port):
    (home / "tls").mkdir()
    tls.create_ca(home / "tls")
    ca = (home / "tls" / "ca.pem").read_bytes()
    write_operator_credentials(home, f"https://127.0.0.1:{free_port}", "t", ca)
    with lock_home(home):
        found = read_cloud_status(home)
    assert (found.running, found.healthy) == (True, False)
    assert found.fault.startswith(f"it does not answer: https://127.0.0.1:{free_port}")
    assert datetime.datetime.fromisoformat(found.ca_expires) > datetime.datetime.now(datetime.UTC)


def test_another_folder_is_refused(tmp_path):
    with pytest.raises(HomeError):
        read_cloud_status(tmp_path)
