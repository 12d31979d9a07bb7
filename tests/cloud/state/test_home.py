import asyncio
import contextlib
import datetime
import json
import socket
import stat

import pytest

from cloud.broker.child import find_mosquitto
from cloud.state.enrolment import Enrolment
from cloud.state.home import AggregatorOptions, CloudHome
from cloud.state.store import open_database
from edgefl.errors import ConfigError, HomeError
from edgefl.local_fleet import free_ports
from edgefl.process.home import create_home
from edgefl.protocols import tls


def options(home, **changes):
    grpc_port, http_port, mqtt_port = free_ports(3)
    ports = {"grpc_port": grpc_port, "http_port": http_port, "mqtt_port": mqtt_port}
    return AggregatorOptions(home=home, **ports | changes)


def test_the_first_start_makes_keys_that_only_their_owner_reads(tmp_path):
    home = tmp_path / "home"
    with CloudHome(options(home)):
        for name in ("tls/ca.key", "tls/key.pem", "fleet.key", "operator.json"):
            assert stat.S_IMODE((home / name).stat().st_mode) == 0o600
        assert stat.S_IMODE(home.stat().st_mode) == 0o700


def test_the_next_start_keeps_ca_fleet_key_and_operator(tmp_path):
    names = ("tls/ca.pem", "tls/ca.key", "tls/cert.pem", "fleet.key")
    with CloudHome(options(tmp_path)):
        first = [(tmp_path / name).read_bytes() for name in names]
        token = json.loads((tmp_path / "operator.json").read_text())["token"]
    with CloudHome(options(tmp_path)):
        assert [(tmp_path / name).read_bytes() for name in names] == first
        assert json.loads((tmp_path / "operator.json").read_text())["token"] == token


def test_another_name_makes_another_certificate_of_the_same_ca(tmp_path):
    with CloudHome(options(tmp_path)):
        ca, first = (tmp_path / "tls/ca.pem").read_bytes(), (tmp_path / "tls/cert.pem").read_bytes()
    with CloudHome(options(tmp_path, names=("cloud.example.org",))) as home:
        assert home.identity.ca.read_bytes() == ca
        assert home.identity.cert.read_bytes() != first
        assert tls.common_name(home.identity.cert.read_bytes()) == "cloud"


def test_one_home_has_one_cloud_at_a_time(tmp_path):
    with CloudHome(options(tmp_path)), pytest.raises(HomeError, match="in use by process"):
        CloudHome(options(tmp_path))
    with CloudHome(options(tmp_path)):
        pass


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"insecure": True, "host": "0.0.0.0"}, "--insecure is for loopback only"),  # noqa: S104
        ({"broker": "mqtts://host"}, "expected embedded, builtin or mqtts://host:port"),
        ({"broker": "http://host:1"}, "expected embedded, builtin or mqtts://host:port"),
        ({"broker": "mqtt://127.0.0.1:1883"}, "is not encrypted"),
    ],
)
def test_options_that_would_not_be_safe_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        options(tmp_path, **changes)


OWN = [pytest.param("embedded", marks=pytest.mark.skipif(find_mosquitto() is None, reason="no mosquitto")), "builtin"]


@pytest.mark.parametrize("broker", OWN)
def test_the_port_of_its_own_broker_in_use_is_named(tmp_path, broker):
    async def run(chosen):
        with CloudHome(chosen) as home:
            async with home.broker():
                pass

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"{port}.*--mqtt-port"):
            asyncio.run(run(options(tmp_path, mqtt_port=port, broker=broker)))


def test_which_program_its_broker_is(tmp_path, monkeypatch):
    with CloudHome(options(tmp_path / "a", broker="mqtts://127.0.0.1:1")) as home:
        assert home.broker_name == "external"
    with CloudHome(options(tmp_path / "b", broker="builtin")) as home:
        assert home.broker_name == home.services().broker == "builtin"
    monkeypatch.setattr("cloud.state.home.find_mosquitto", lambda: "/somewhere/mosquitto")
    with CloudHome(options(tmp_path / "c")) as home:
        assert home.broker_name == "mosquitto"
    with CloudHome(options(tmp_path / "d", insecure=True)) as home:
        assert home.broker_name == "builtin"  # mosquitto is configured for certificates
    monkeypatch.setattr("cloud.state.home.find_mosquitto", lambda: None)
    with CloudHome(options(tmp_path / "e")) as home:
        assert home.broker_name == "builtin"


def test_a_removed_device_is_cut_everywhere_though_one_of_them_fails(tmp_path):
    cut = []

    def fail(_device):
        raise OSError("disk full")

    with CloudHome(options(tmp_path)) as home:
        home.cut = [cut.append, fail, cut.append]
        with pytest.raises(OSError, match="disk full"):
            home.services().link.forget("cam-1")
    assert cut == ["cam-1", "cam-1"]


@pytest.fixture
def old_home(tmp_path, monkeypatch):
    """A home of an earlier version: its certificates begin a day back, and its CA ends after ten years."""
    now = datetime.datetime.now(datetime.UTC)
    with monkeypatch.context() as before:
        before.setattr(tls, "BEGIN", now - datetime.timedelta(days=1))
        before.setattr(tls, "NO_END", now + datetime.timedelta(days=3650))
        create_home(tmp_path, "cloud")
        (tmp_path / "tls").mkdir()
        tls.create_ca(tmp_path / "tls")
        tls.issue_server(tmp_path / "tls", tls.Identity.in_folder(tmp_path / "tls"), ["127.0.0.1"])
    return tmp_path


def begins(path):
    return tls.load_certificate(path.read_bytes()).not_valid_before_utc


def test_a_home_of_an_earlier_version_gets_certificates_that_no_clock_behind_shuts_out(old_home):
    key = (old_home / "tls/ca.key").read_bytes()
    with CloudHome(options(old_home)):
        assert begins(old_home / "tls/ca.pem") == begins(old_home / "tls/cert.pem") == tls.BEGIN
        assert (old_home / "tls/ca.key").read_bytes() == key
        assert json.loads((old_home / "operator.json").read_text())["ca"] == (old_home / "tls/ca.pem").read_text()


def test_a_token_that_names_the_former_ca_stays_good(old_home):
    engine = open_database(old_home / "cloud.db")
    token = Enrolment(engine, old_home / "tls").new_token()
    with CloudHome(options(old_home)) as home:
        assert tls.parse_token(token)[1] == tls.fingerprint(home.identity.ca.read_bytes())
        assert begins(home.identity.cert) == tls.BEGIN
    engine.dispose()


def shown_at(port, ca):
    """Return the serial number of the certificate that a port shows."""
    context = tls.client_context(ca)
    with socket.create_connection(("127.0.0.1", port), 5) as raw, context.wrap_socket(
        raw, server_hostname="127.0.0.1"
    ) as secure:  # fmt: skip
        return tls.serial_number(secure.getpeercert(binary_form=True))


@pytest.mark.parametrize("broker", OWN)
def test_a_certificate_is_renewed_while_the_cloud_runs_and_shown_by_its_broker(tmp_path, broker):
    chosen = options(tmp_path, broker=broker)
    folder = tmp_path / ("tls" if broker == "builtin" else "broker")

    async def run():
        with CloudHome(chosen) as home:
            async with home.broker():
                assert not await asyncio.to_thread(home.renew_certificates)
                before = await asyncio.to_thread(shown_at, chosen.mqtt_port, home.identity.ca)
                assert before == tls.serial_number((folder / "cert.pem").read_bytes())
                tls.issue_server(tmp_path / "tls", tls.Identity.in_folder(folder), ["127.0.0.1"], days=-1)
                assert await asyncio.to_thread(home.renew_certificates) is (broker == "builtin")
                wanted = tls.serial_number((folder / "cert.pem").read_bytes())
                for _ in range(100):  # mosquitto reads the signal between two handshakes, and may break one off for it
                    with contextlib.suppress(OSError):
                        if await asyncio.to_thread(shown_at, chosen.mqtt_port, home.identity.ca) == wanted:
                            return
                raise AssertionError("the former certificate is still shown")

    asyncio.run(run())
