"""`edgefl cloud`, as it is typed. Starting a whole cloud is for the tests of whole processes."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner

from cloud.cli import cloud
from cloud.state.enrolment import Enrolment
from cloud.state.store import open_database
from edgefl.errors import ConfigError, HomeError
from edgefl.local_fleet import LocalFleet
from edgefl.protocols import tls
from edgefl.protocols.tls import Identity


def invoke(*arguments):
    return CliRunner(mix_stderr=False).invoke(cloud, [str(one) for one in arguments])


def test_a_token_is_all_that_stdout_has_and_it_enrols(home, tmp_path):
    done = invoke("token", "--home", home)
    assert done.exit_code == 0, done.exception
    secret, fingerprint = tls.parse_token(done.stdout)
    assert fingerprint == tls.fingerprint((home / "tls" / "ca.pem").read_bytes())
    engine = open_database(home / "cloud.db")  # as a cloud that runs beside
    csr = tls.new_request(Identity.in_folder(tmp_path), "a")
    assert Enrolment(engine, home / "tls").enroll(secret, "a", {}, csr)
    assert tls.parse_token(invoke("token", "--home", home, "--valid-for", 5).stdout)
    engine.dispose()


def test_a_token_as_json(home):
    result = json.loads(invoke("token", "--home", home, "--valid-for", 60, "--json", "-").stdout)
    assert result["valid_for_s"] == 60
    assert tls.parse_token(result["token"])


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [(["--valid-for", "0"], ConfigError, "at most a year"), ([], HomeError, "home.json")],
)
def test_a_token_that_cannot_be(home, tmp_path, arguments, kind, said):
    folder = home if arguments else tmp_path / "none"
    done = invoke("token", "--home", folder, *arguments)
    assert (done.exit_code, type(done.exception)) == (1, kind)
    assert said in str(done.exception)


def test_a_home_of_a_newer_version_is_refused(home):
    (home / "home.json").write_text('{"kind": "cloud", "format": 99, "made_by": "9.9"}')
    for command in (["token"], ["broker-config"], ["start"]):
        done = invoke(*command, "--home", home)
        assert isinstance(done.exception, HomeError)
        assert "format 99" in str(done.exception)


def test_a_cloud_that_is_ready_says_what_comes_next(tmp_path):
    with LocalFleet(tmp_path) as fleet:
        fleet.start_cloud()
        fleet.cloud.wait_for(f"edgefl cloud token --home {fleet.home}", 10)
        fleet.cloud.wait_for(str(fleet.credentials), 10)


def test_a_brokers_folder_is_made_before_the_cloud_ever_ran(tmp_path):
    done = invoke("broker-config", "--home", tmp_path / "new", "--port", 8884, "--name", "broker.example.org")
    assert done.exit_code == 0, done.exception
    folder = tmp_path / "new" / "mosquitto"
    assert {one.name for one in folder.iterdir()} == {
        "mosquitto.conf",
        "acl",
        "ca.pem",
        "cert.pem",
        "key.pem",
        "crl.pem",
    }
    assert "listener 8884 127.0.0.1" in (folder / "mosquitto.conf").read_text()
    assert stat.S_IMODE((folder / "key.pem").stat().st_mode) == 0o600
    assert (folder / "ca.pem").read_bytes() == (tmp_path / "new" / "tls" / "ca.pem").read_bytes()
    from cryptography import x509

    names = x509.load_pem_x509_certificate((folder / "cert.pem").read_bytes()).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    assert "broker.example.org" in names.value.get_values_for_type(x509.DNSName)


def test_a_brokers_folder_uses_the_ca_that_is_there(home):
    before = (home / "tls" / "ca.pem").read_bytes()
    done = invoke("broker-config", "--home", home, "--json", "-")
    assert (home / "mosquitto" / "ca.pem").read_bytes() == before
    assert Path(json.loads(done.stdout)["config"]).exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--insecure", "--host", "0.0.0.0"], "--insecure is for loopback only"),  # noqa: S104 - refused
        (["--broker", "amqp://h:1"], "expected embedded, builtin or mqtts://host:port"),
        (["--broker", "mqtt://h:1883"], "is not encrypted"),
    ],
)
def test_a_cloud_that_would_not_be_safe_does_not_start(tmp_path, arguments, said):
    done = invoke("start", "--home", tmp_path / "home", *arguments)
    assert (done.exit_code, type(done.exception)) == (1, ConfigError)
    assert said in str(done.exception)
    assert not (tmp_path / "home").exists()


def test_tokens_are_listed_by_id_and_revoked(home):
    token = invoke("token", "--home", home, "--label", "for cam-1").stdout.strip()
    [row] = json.loads(invoke("tokens", "list", "--home", home, "--json", "-").stdout)
    assert (row["state"], row["label"]) == ("open", "for cam-1")
    shown = invoke("tokens", "list", "--home", home).stdout
    assert row["id"] in shown
    assert tls.parse_token(token)[0] not in shown
    assert invoke("tokens", "revoke", row["id"][:6], "--home", home).stdout == f"token {row['id']} is revoked\n"
    again = invoke("tokens", "revoke", row["id"], "--home", home)
    assert "it is revoked" in str(again.exception)


def test_the_status_of_a_cloud_that_does_not_run(home):
    done = invoke("status", "--home", home)
    assert done.exit_code == 1
    assert "fault                it does not run" in done.stdout
    assert json.loads(invoke("status", "--home", home, "--json", "-").stdout)["running"] is False
