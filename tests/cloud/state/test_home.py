import datetime
import json
import socket
import stat

import pytest

from cloud.state.enrolment import Enrolment
from cloud.state.home import AggregatorOptions, CloudHome
from cloud.state.store import open_database
from edgefl.app.local_fleet import free_ports
from edgefl.errors import ConfigError, HomeError
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
        ({"broker": "mqtts://host"}, "neither 'embedded' nor mqtts://host:port"),
        ({"broker": "http://host:1"}, "neither 'embedded' nor mqtts://host:port"),
        ({"broker": "mqtt://127.0.0.1:1883"}, "is not encrypted"),
    ],
)
def test_options_that_would_not_be_safe_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        options(tmp_path, **changes)


def test_the_embedded_brokers_port_in_use_is_named(tmp_path):
    with CloudHome(options(tmp_path / "one")) as first:
        port = int(first.broker_url.rpartition(":")[2])
        with pytest.raises(ConfigError, match=str(port)), CloudHome(options(tmp_path / "two", mqtt_port=port)):
            pass


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


def test_the_clouds_certificate_is_renewed_while_it_runs_and_shown_at_every_door(tmp_path):
    chosen = options(tmp_path)
    with CloudHome(chosen) as home:
        assert not home.look_after_certificates()
        tls.issue_server(tmp_path / "tls", home.identity, ["127.0.0.1"], days=-1)
        assert home.look_after_certificates()
        context = tls.client_context(home.identity.ca, home.identity)
        context.check_hostname = True
        with (
            socket.create_connection(("127.0.0.1", chosen.mqtt_port), 5) as raw,
            context.wrap_socket(raw, server_hostname="127.0.0.1") as secure,
        ):
            shown = tls.serial_number(secure.getpeercert(binary_form=True))
        assert shown == tls.serial_number(home.identity.cert.read_bytes())
