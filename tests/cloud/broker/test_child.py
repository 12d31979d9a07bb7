"""A mosquitto as a child: it serves, is started again, ends with its owner, and says why it does not start."""

from __future__ import annotations

import asyncio
import os
import stat

import psutil
import pytest

from cloud.broker import child as child_module
from cloud.broker.child import MosquittoChild, find_mosquitto
from cloud.broker.mosquitto import Mosquitto, MosquittoSettings
from cloud.broker.mosquitto_config import CONFIG_FILE, CRL_FILE
from cloud.trust.crl import make_crl
from edgefl.errors import ConfigError
from edgefl.protocols.mqtt import LinkConfig
from tests.threaded import Link

PROGRAM = find_mosquitto()
needs_mosquitto = pytest.mark.skipif(
    PROGRAM is None, reason="mosquitto is not installed; run deploy/system-packages.sh"
)


@pytest.fixture
def child(fleet_ca, free_port, monkeypatch):
    """`child(program)`: not started yet."""
    (fleet_ca.folder / CRL_FILE).write_bytes(make_crl(fleet_ca.folder, []))
    monkeypatch.setattr(child_module, "FIRST_DELAY_S", 0.01)
    url = f"mqtts://127.0.0.1:{free_port}"

    def make(program=PROGRAM):
        settings = MosquittoSettings(
            url=url, folder=fleet_ca.folder, ca_folder=fleet_ca.folder, revoked=list, certificate_days=397.0
        )
        return MosquittoChild(str(program), fleet_ca.folder, "127.0.0.1", free_port, Mosquitto(settings))

    make.url = url
    return make


def connects(url, identity):
    with Link(LinkConfig(url=url, client_id="cam-1", identity=identity), on_failure=pytest.fail) as link:
        return link.wait_connected(10)


def mosquittos():
    return [one for one in psutil.Process().children() if one.name() == "mosquitto"]


@needs_mosquitto
def test_it_serves_and_ends_with_its_owner(child, fleet_ca):
    async def run():
        async with child() as broker:
            assert (broker.program, broker.reason) == ("mosquitto", "")
            assert await asyncio.to_thread(connects, child.url, fleet_ca.device("cam-1"))
            [process] = mosquittos()
            return process

    process = asyncio.run(run())
    assert not process.is_running()
    assert mosquittos() == []


@needs_mosquitto
def test_one_that_is_killed_is_named_and_started_again(child, fleet_ca, caplog):
    async def run():
        async with child() as broker:
            [first] = mosquittos()
            first.kill()
            caplog.clear()
            while first.is_running() and first.status() != psutil.STATUS_ZOMBIE:
                pass
            assert await asyncio.to_thread(connects, child.url, fleet_ca.device("cam-1"))
            assert broker.reason == ""
            assert [one.pid for one in mosquittos()] != [first.pid]

    asyncio.run(run())
    assert "broker.ended status=-9" in caplog.text


@needs_mosquitto
def test_a_port_in_use_is_named_before_it_is_started(child):
    async def run():
        async with child():
            with pytest.raises(ConfigError, match="--mqtt-port"):
                await child().__aenter__()
            assert len(mosquittos()) == 1

    asyncio.run(run())


def program(folder, text):
    path = folder / "mosquitto"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.mark.parametrize("text", ["echo 'x: Error: no such key' >&2; exit 3", "exec /nowhere"])
def test_one_that_does_not_start_says_why_and_what_else_there_is(child, tmp_path, text):
    with pytest.raises(ConfigError, match=r"mosquitto has exited .*--broker builtin"):
        asyncio.run(child(program(tmp_path, text)).__aenter__())


def test_one_that_says_nothing_is_given_up(child, tmp_path, monkeypatch):
    monkeypatch.setattr(child_module, "START_S", 0.2)
    with pytest.raises(ConfigError, match="has not started"):
        asyncio.run(child(program(tmp_path, "exec sleep 60")).__aenter__())


@pytest.mark.parametrize(
    ("said", "usable"), [("mosquitto version 1.6.9", False), ("mosquitto version 2.1.0", True), ("", False)]
)
def test_one_that_is_too_old_is_not_taken(tmp_path, monkeypatch, caplog, said, usable):
    path = program(tmp_path, f"echo '{said}'")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin:/usr/bin")
    assert find_mosquitto() == (str(path) if usable else None)
    assert ("broker.mosquitto_too_old" in caplog.text) is not usable


def test_without_one_there_is_none(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    assert find_mosquitto() is None


@needs_mosquitto
def test_its_configuration_is_that_of_broker_config_but_for_its_user_and_its_log(child, fleet_ca):
    child()._write_config()
    config = (fleet_ca.folder / CONFIG_FILE).read_text()
    assert "log_type notice" not in config
    assert "max_connections " in config
    assert config.rstrip().splitlines()[-1].startswith("user ")
