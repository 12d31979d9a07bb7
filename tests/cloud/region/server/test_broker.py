"""The mosquitto of a region: its own certificate, the parent's list of revoked ones, and an end for removed devices."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import psutil
import pytest

from cloud.broker import child as child_module
from cloud.broker.child import MosquittoChild, find_mosquitto
from cloud.broker.mosquitto_config import CONFIG_FILE, CRL_FILE
from cloud.region.server.broker import RegionMosquitto
from cloud.trust.crl import make_crl
from edgefl.protocols import tls
from edgefl.protocols.mqtt import LinkConfig
from edgefl.protocols.tls import REGION_DOMAIN, Identity
from tests.threaded import Link

PROGRAM = find_mosquitto()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="mosquitto is not installed; run deploy/system-packages.sh")


class Region:
    """Region r1 with a mosquitto of its own, and what its parent has told it."""

    def __init__(self, ca, folder, port):
        self.ca, self.port, self.members, self.list = ca, port, {"cam-1", "cam-2"}, b""
        own = folder / "tls"
        own.mkdir()
        self.identity = Identity.in_folder(own)
        self.identity.ca.write_bytes((ca.folder / "ca.pem").read_bytes())
        request = tls.new_request(self.identity, "r1")
        self.identity.cert.write_bytes(tls.sign_request(ca.folder, request, "r1", domain=REGION_DOMAIN))
        self.folder = folder / "broker"
        self.control = RegionMosquitto(self.folder, self.identity, lambda: self.list, lambda: self.members)
        self.child = MosquittoChild(str(PROGRAM), self.folder, "127.0.0.1", port, self.control, owner="r1")
        self.control.restart = self.child.restart

    def link(self, name, identity):
        url = f"mqtts://127.0.0.1:{self.port}"
        config = LinkConfig(url=url, client_id=name, identity=identity, server_name="r1" + REGION_DOMAIN)
        return Link(config, on_failure=pytest.fail)

    def revoke(self, identity):
        self.list = make_crl(self.ca.folder, [tls.serial_number(identity.cert.read_bytes())])


@pytest.fixture
def region(fleet_ca, tmp_path, free_port, monkeypatch):
    monkeypatch.setattr(child_module, "FIRST_DELAY_S", 0.01)
    return Region(fleet_ca, tmp_path, free_port)


def mosquittos():
    return [one.pid for one in psutil.Process().children() if one.name() == "mosquitto"]


async def until(predicate):
    async with asyncio.timeout(30):
        while not predicate():
            await asyncio.to_thread(time.sleep, 0.02)


def test_a_removed_device_loses_its_connection_and_the_others_come_back(region, fleet_ca):
    async def run():
        async with region.child as broker:
            assert "crlfile" not in (region.folder / CONFIG_FILE).read_text()  # the parent has not sent a list yet
            own = fleet_ca.device("cam-1"), fleet_ca.device("cam-2")
            with region.link("cam-1", own[0]) as first, region.link("cam-2", own[1]) as second:
                for one in (first, second):
                    assert await asyncio.to_thread(one.wait_connected, 20)
                region.revoke(own[0])
                region.members.discard("cam-1")
                await asyncio.to_thread(region.control.drop, "cam-1")
                await until(lambda: first.reason)
                await until(lambda: not second.reason and not broker.reason)
                assert "crlfile" in (region.folder / CONFIG_FILE).read_text()
                assert first.reason

    asyncio.run(run())


def test_a_device_that_is_assigned_elsewhere_leaves_by_itself(region, fleet_ca):
    region.list = make_crl(fleet_ca.folder, [])

    async def run():
        async with region.child:
            before = mosquittos()
            await asyncio.to_thread(region.control.drop, "cam-2")  # it is still a member, of another region
            region.revoke(fleet_ca.device("cam-3"))
            await asyncio.to_thread(region.control.refresh)  # a reload is enough: connections stay
            assert mosquittos() == before
            assert (region.folder / CRL_FILE).read_bytes() == region.list

    asyncio.run(run())


def test_it_comes_back_after_a_kill_and_the_region_hears_its_devices(region, fleet_ca):
    region.list = make_crl(fleet_ca.folder, [])

    async def run():
        async with region.child as broker:
            with region.link("r1", region.identity) as owner, region.link("cam-1", fleet_ca.device("cam-1")) as device:
                for one in (owner, device):
                    assert await asyncio.to_thread(one.wait_connected, 20)
                [killed] = mosquittos()
                os.kill(killed, signal.SIGKILL)
                await until(lambda: broker.reason)
                await until(lambda: not (broker.reason or owner.reason or device.reason))
                assert mosquittos() != [killed]

    asyncio.run(run())
    assert mosquittos() == []


def test_a_renewed_certificate_is_taken_over(region):
    before = Identity.in_folder(region.folder).cert.read_bytes()
    request = tls.new_request(region.identity, "r1")
    region.identity.cert.write_bytes(tls.sign_request(region.ca.folder, request, "r1", domain=REGION_DOMAIN))
    region.control.refresh()
    here = Identity.in_folder(region.folder)
    assert here.cert.read_bytes() == region.identity.cert.read_bytes() != before
    assert here.key.read_bytes() == region.identity.key.read_bytes()
    assert here.key.stat().st_mode & 0o077 == 0
