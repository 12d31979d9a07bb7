"""The list of revoked certificates: from a real cloud's HTTPS plane into a device's home, and what is not taken."""

from __future__ import annotations

import asyncio
import datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from cloud.trust.crl import make_crl
from edge_agent.link.profile import Profile
from edge_agent.serving import revoked
from edge_agent.serving.access import REVOKED_FILE
from edge_agent.serving.revoked import RevokedList, check_list
from edgefl.errors import ProtocolError
from edgefl.protocols import tls


@pytest.fixture
def home(http_plane, tmp_path):
    """The home of a device of the HTTPS plane's fleet, as far as the list needs one."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "ca.pem").write_bytes(http_plane.ca.cloud.ca.read_bytes())
    return folder


class Kept:
    """A list that is kept up to date while the block runs, and how often it was told to be another."""

    def __init__(self, home, url):
        profile = Profile(device="cam-1", cloud_url=url, grpc="127.0.0.1:1", broker="mqtts://127.0.0.1:1")
        self.path, self.changes = home / REVOKED_FILE, 0
        self.list = RevokedList(home, profile, self._count)

    def _count(self):
        self.changes += 1

    async def __aenter__(self):
        self._task = asyncio.create_task(self.list.run())
        return self

    async def __aexit__(self, *_):
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def names(self, *serials):
        """Whether it names these certificates and no others."""
        if not self.path.exists():
            return False
        crl = x509.load_pem_x509_crl(self.path.read_bytes())
        return {entry.serial_number for entry in crl} == {int(one, 16) for one in serials}


def serial_of(plane, name):
    return next(device.serial for device in plane.enrolment.devices() if device.name == name)


def test_it_is_fetched_when_the_cloud_is_reachable_and_again_when_it_is_so_again(http_plane, home, until):
    http_plane.enroll("cam-2", "cam-3")
    serial = serial_of(http_plane, "cam-2")

    async def run():
        async with Kept(home, http_plane.url) as kept:
            kept.list.refresh()
            await until(lambda: kept.names() and kept.changes == 1)
            http_plane.enrolment.remove("cam-2")
            kept.list.refresh()
            await until(lambda: kept.names(serial) and kept.changes == 2)
        assert await kept.list._refresh() == revoked.REFRESH_S
        assert kept.changes == 2  # it is the same

    asyncio.run(run())


def test_it_is_fetched_now_and_then_too(http_plane, home, until, monkeypatch):
    monkeypatch.setattr(revoked, "REFRESH_S", 0.05)

    async def run():
        async with Kept(home, http_plane.url) as kept:
            # Once is enough, and nothing is under way at the end: httpx forgets a connection that is cut off.
            kept.list._changed = lambda: monkeypatch.setattr(revoked, "REFRESH_S", 300.0)
            await until(kept.names)

    asyncio.run(run())


def test_a_cloud_that_does_not_answer_leaves_the_list_and_is_asked_again(http_plane, home, until, monkeypatch, caplog):
    monkeypatch.setattr(revoked, "FIRST_RETRY_S", 0.01)
    held = make_crl(http_plane.ca.folder, ["ff"])
    (home / REVOKED_FILE).write_bytes(held)

    async def run():
        async with Kept(home, "https://127.0.0.1:1") as kept:
            kept.list.refresh()
            await until(lambda: "revoked.not_fetched" in caplog.text)
            assert kept.path.read_bytes() == held
            kept.list._url = f"{http_plane.url}/v1/crl"
            await until(kept.names)

    asyncio.run(run())


@pytest.mark.parametrize(("path", "reason"), [("/v1/ca", "not a list"), ("/v1/none", "answered 404; expected 200")])
def test_what_is_no_list_leaves_the_one_that_is_kept(http_plane, home, until, caplog, path, reason):
    held = make_crl(http_plane.ca.folder, ["ff"])
    (home / REVOKED_FILE).write_bytes(held)

    async def run():
        async with Kept(home, http_plane.url) as kept:
            kept.list._url = http_plane.url + path
            kept.list.refresh()
            await until(lambda: reason in caplog.text)
            assert kept.changes == 0

    asyncio.run(run())
    assert (home / REVOKED_FILE).read_bytes() == held


def test_a_list_that_is_too_long_is_not_read_to_its_end(http_plane, home, until, caplog, monkeypatch):
    monkeypatch.setattr(revoked, "MAX_LIST_BYTES", 100)

    async def run():
        async with Kept(home, http_plane.url) as kept:
            kept.list.refresh()
            await until(lambda: "more than 100 bytes" in caplog.text)

    asyncio.run(run())
    assert not (home / REVOKED_FILE).exists()


def test_a_cloud_of_another_ca_is_not_listened_to(http_plane, home, until, caplog, strange_ca):
    (home / "ca.pem").write_bytes(strange_ca.cloud.ca.read_bytes())

    async def run():
        async with Kept(home, http_plane.url) as kept:
            kept.list.refresh()
            await until(lambda: "CERTIFICATE_VERIFY_FAILED" in caplog.text)

    asyncio.run(run())
    assert not (home / REVOKED_FILE).exists()


def test_a_list_that_the_disk_damaged_is_dropped_at_the_start(http_plane, home, caplog):
    (home / REVOKED_FILE).write_bytes(b"-----BEGIN X509 CRL-----\n")

    async def run():
        Kept(home, http_plane.url)

    asyncio.run(run())
    assert not (home / REVOKED_FILE).exists()
    assert "revoked.damaged" in caplog.text


def test_a_list_of_another_ca_is_not_taken(fleet_ca, strange_ca):
    ours, theirs = (one.cloud.ca.read_bytes() for one in (fleet_ca, strange_ca))
    assert len(check_list(make_crl(fleet_ca.folder, ["1", "2"]), ours)) == 2
    with pytest.raises(ProtocolError, match="not signed by this fleet's CA"):  # both CAs have the same name
        check_list(make_crl(fleet_ca.folder, []), theirs)


def test_a_list_that_would_end_while_a_device_is_offline_is_not_taken(fleet_ca):
    ca, key = tls.load_ca(fleet_ca.folder)
    crl = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(ca.subject)
        .last_update(tls.BEGIN)
        .next_update(tls.BEGIN + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    with pytest.raises(ProtocolError, match="expires on 1970-01-02, before its CA does"):
        check_list(crl.public_bytes(serialization.Encoding.PEM), ca.public_bytes(serialization.Encoding.PEM))
