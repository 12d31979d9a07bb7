"""The doctor: a healthy device passes, and every illness is named with what to do."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import http.server
import json
import math
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner, Result

from edge_agent.install import doctor as doctoring
from edge_agent.install import probes
from edge_agent.install.doctor import check_clock, check_disk, check_task, doctor, interpret_service, run_checks
from edge_agent.install.probes import Check
from edge_agent.link.profile import SERVING_FILE, Profile, load_profile, save_profile
from edgefl.process.home import create_home, lock_home
from edgefl.protocols import tls
from edgefl.protocols.tls import Identity


class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"status": "ok", "version": "9.9", "time": time.time()}).encode())

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def cloud_of(identity: Identity) -> Iterator[int]:
    """One port that answers health, for clients with a certificate and for those without, as gRPC and brokers do."""
    context = tls.server_context(identity, client_certificates=True)
    context.verify_mode = ssl.CERT_OPTIONAL
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Health) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), name="cloud of the test")
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join(10)


@contextlib.contextmanager
def data_plane(identity: Identity, code: grpc.StatusCode = grpc.StatusCode.OK, reason: str = "") -> Iterator[int]:
    """A gRPC port that answers `Next` with a status code."""

    def answer(_request: bytes, context: grpc.ServicerContext) -> bytes:
        if code is not grpc.StatusCode.OK:
            context.abort(code, reason)
        return b""

    methods = {"Next": grpc.unary_unary_rpc_method_handler(answer)}
    with ThreadPoolExecutor(1) as workers:
        server = grpc.server(workers, [grpc.method_handlers_generic_handler("edgefl.v1.Fleet", methods)])
        port = server.add_secure_port("localhost:0", tls.grpc_server_credentials(identity))
        server.start()
        try:
            yield port
        finally:
            server.stop(None).wait(5)


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "REFUSAL_S", 0.05)


@pytest.fixture
def serve_port() -> int:
    """A port that is free."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """The home of an enrolled device, whose cloud answers at every door."""
    ca, folder = tmp_path / "cloud", tmp_path / "home"
    ca.mkdir()
    tls.create_ca(ca)
    tls.issue_server(ca, Identity.in_folder(ca), ["localhost"])
    create_home(folder, "agent")
    mine = Identity.in_folder(folder)
    mine.cert.write_bytes(tls.sign_request(ca, tls.new_request(mine, "pi-4"), "pi-4"))
    mine.ca.write_bytes((ca / "ca.pem").read_bytes())
    (folder / "fleet.pub").touch()
    with cloud_of(Identity.in_folder(ca)) as port, data_plane(Identity.in_folder(ca)) as grpc_port:
        address = f"localhost:{port}"
        grpc_address = f"localhost:{grpc_port}"
        save_profile(
            folder,
            Profile(device="pi-4", cloud_url=f"https://{address}", grpc=grpc_address, broker=f"mqtts://{address}"),
        )
        yield folder


def diagnose(home: Path, port: int) -> dict[str, Check]:
    return {check.check: check for check in run_checks(home, port)}


def invoke(home: Path, port: int, *more: str) -> Result:
    return CliRunner(mix_stderr=False).invoke(doctor, ["--home", str(home), "--serve-port", str(port), *more])


def test_a_healthy_device_passes(home: Path, serve_port: int) -> None:
    found = diagnose(home, serve_port)
    bad = {name: check for name, check in found.items() if check.state == "fail"}
    assert not bad
    assert {"home", "disk", "serving port", "certificate", "cloud", "clock", "data plane", "broker"} <= set(found)
    assert found["cloud"].seen.endswith("runs edgefl 9.9")
    assert found["data plane"].seen.endswith("the cloud accepts this device")


def test_the_table_names_each_check(home: Path, serve_port: int) -> None:
    result = invoke(home, serve_port)
    assert result.exit_code == 0, result.output
    for word in ("what to do", "certificate", "data plane", "broker", "clock"):
        assert word in result.output


def test_json_to_stdout_is_json_alone(home: Path, serve_port: int) -> None:
    result = invoke(home, serve_port, "--json", "-")
    facts = json.loads(result.stdout)
    assert (result.exit_code, facts["ok"], facts["home"]) == (0, True, str(home))
    assert facts["checks"][0].keys() == {"check", "state", "seen", "advice"}


def test_json_to_a_file_beside_the_table(home: Path, serve_port: int, tmp_path: Path) -> None:
    file = tmp_path / "doctor.json"
    assert "certificate" in invoke(home, serve_port, "--json", str(file)).output
    assert json.loads(file.read_text())["ok"] is True


def test_a_failure_is_exit_status_1(home: Path, serve_port: int) -> None:
    (home / "key.pem").chmod(0o644)
    result = invoke(home, serve_port, "--json", "-")
    assert (result.exit_code, json.loads(result.stdout)["ok"]) == (1, False)


def test_a_home_that_is_not_enrolled_ends_the_visit(tmp_path: Path) -> None:
    result = invoke(tmp_path, 1, "--json", "-")
    assert result.exit_code == 1
    (check,) = json.loads(result.stdout)["checks"]
    assert "no home.json" in check["seen"]
    assert "edgefl agent enroll" in check["advice"]


def test_help_has_an_example() -> None:
    assert "Example:\n    edgefl agent doctor" in CliRunner().invoke(doctor, ["--help"]).output


@pytest.mark.parametrize("name", [".", "key.pem"])
def test_what_others_can_read_is_told_with_the_command(home: Path, serve_port: int, name: str) -> None:
    (home / name).chmod(0o755)
    check = diagnose(home, serve_port)["home"]
    assert (check.state, check.advice) == ("fail", f"chmod go= {home / name}")
    assert "has mode 0755: others may read it" in check.seen


@pytest.mark.parametrize("name", ["key.pem", "cert.pem", "ca.pem"])
def test_what_is_missing_is_told_and_the_cloud_is_not_blamed(home: Path, serve_port: int, name: str) -> None:
    (home / name).unlink()
    found = diagnose(home, serve_port)
    assert found["home"].seen == f"{home} has no {name}"
    assert found["certificate"].state == "fail"
    assert not {"cloud", "broker"} & set(found)


def test_a_damaged_certificate_is_told(home: Path, serve_port: int) -> None:
    (home / "cert.pem").write_text("-----BEGIN")
    assert "cannot be read" in diagnose(home, serve_port)["certificate"].seen


def test_a_certificate_of_another_key_is_told(home: Path, serve_port: int, tmp_path: Path) -> None:
    tls.new_request(Identity.in_folder(home), "pi-4")  # makes a new key
    assert diagnose(home, serve_port)["certificate"].seen == "the certificate is for another key"


def issue(home: Path, ca: Path, name: str = "pi-4") -> None:
    mine = Identity.in_folder(home)
    mine.cert.write_bytes(tls.sign_request(ca, tls.new_request(mine, name), name))


def test_a_certificate_of_another_name_is_told(home: Path, serve_port: int, tmp_path: Path) -> None:
    issue(home, tmp_path / "cloud", "pi-5")
    assert "the certificate is for 'pi-5'" in diagnose(home, serve_port)["certificate"].seen


def test_a_certificate_of_another_fleet_is_told_by_us_and_by_them(home: Path, serve_port: int, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    tls.create_ca(tmp_path / "other")
    issue(home, tmp_path / "other")
    found = diagnose(home, serve_port)
    assert found["certificate"].seen == "not signed by this fleet's CA"
    assert "refuses this device's certificate as of another fleet" in found["broker"].seen


@pytest.mark.parametrize(
    ("begins_in_days", "days", "state", "seen"),
    [
        (-3, -1, "fail", "the certificate expired on"),
        (2, 10, "fail", "by this clock the certificate is not valid before"),
        (-1, 20, "warn", "valid until"),
        (-1, 90, "ok", "valid until"),
    ],
)
def test_the_dates_of_the_certificate(
    home: Path, serve_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    begins_in_days: int, days: int, state: str, seen: str,
) -> None:  # fmt: skip
    now = datetime.datetime.now(datetime.UTC)
    monkeypatch.setattr(tls, "BEGIN", now + datetime.timedelta(days=begins_in_days))
    monkeypatch.setattr(tls, "LEAF_DAYS", days)
    issue(home, tmp_path / "cloud")
    check = diagnose(home, serve_port)["certificate"]
    assert (check.state, bool(check.advice)) == (state, state != "ok")
    assert check.seen.startswith(seen)


def test_a_cloud_that_is_down_is_told_at_every_door(home: Path, serve_port: int) -> None:
    address = f"localhost:{serve_port}"  # where nothing listens
    save_profile(
        home, Profile(device="pi-4", cloud_url=f"https://{address}", grpc=address, broker=f"mqtts://{address}")
    )
    found = diagnose(home, serve_port)
    for name in ("cloud", "data plane", "broker"):
        assert found[name].seen == f"nothing listens on {address}"
    assert "clock" not in found


def test_a_loopback_trial_needs_no_certificate(home: Path, serve_port: int) -> None:
    for name in ("key.pem", "cert.pem", "ca.pem", "fleet.pub"):
        (home / name).unlink()
    address = f"localhost:{serve_port}"
    save_profile(home, Profile(device="pi-4", cloud_url=f"http://{address}", grpc=address, broker=f"mqtt://{address}"))
    found = diagnose(home, serve_port)
    assert found["home"].state == "ok"
    assert "certificate" not in found
    assert found["data plane"].state == "fail"


def doors(home: Path, port: int) -> dict[str, Check]:
    """What the doctor says of the cloud's doors, with its data plane at another port."""
    profile = dataclasses.replace(load_profile(home), grpc=f"localhost:{port}")
    return {check.check: check for check in doctoring.check_cloud(profile, home, Identity.in_folder(home))}


def test_a_device_that_was_removed_is_told_at_both_doors_that_look_into_the_list(home: Path, tmp_path: Path) -> None:
    cloud, reason = Identity.in_folder(tmp_path / "cloud"), "device 'pi-4' is not of this fleet"
    with data_plane(cloud, grpc.StatusCode.PERMISSION_DENIED, reason) as port:
        found = doors(home, port)
    assert [found[name].state for name in ("cloud", "data plane", "broker")] == ["ok", "fail", "fail"]
    assert found["data plane"].seen == reason
    assert found["broker"].seen == f"{load_profile(home).broker} answers, but rejects this device: {reason}"
    assert "new token" in found["data plane"].advice
    assert "new token" in found["broker"].advice


def test_a_cloud_without_a_place_is_told(home: Path, tmp_path: Path) -> None:
    with data_plane(Identity.in_folder(tmp_path / "cloud"), grpc.StatusCode.RESOURCE_EXHAUSTED, "full") as port:
        found = doors(home, port)
    assert (found["data plane"].state, found["data plane"].seen) == ("warn", "full")
    assert found["broker"].state == "ok"


def test_a_port_that_is_no_data_plane_is_told(home: Path, tmp_path: Path) -> None:
    with cloud_of(Identity.in_folder(tmp_path / "cloud")) as port:  # HTTPS, which takes our certificate too
        found = doors(home, port)
    assert found["data plane"].state == "fail"
    assert "does not answer like a data plane: UNAVAILABLE" in found["data plane"].seen
    assert "--grpc-port" in found["data plane"].advice


def test_an_agent_that_serves_is_looked_for_where_it_noted_it(home: Path, serve_port: int) -> None:
    (home / SERVING_FILE).write_text(f"http://127.0.0.1:{serve_port}")
    assert diagnose(home, serve_port)["serving port"].seen == f"{serve_port} is free"  # of an agent that has ended
    with lock_home(home):
        assert "which does not answer" in diagnose(home, 1)["serving port"].seen


def test_the_doctor_does_not_hold_the_home(home: Path, serve_port: int) -> None:
    with lock_home(home):
        diagnose(home, serve_port)
    diagnose(home, serve_port)
    lock_home(home).close()


@pytest.mark.parametrize(
    ("ahead_s", "state", "seen"),
    [
        (0.4, "ok", "0.4 s ahead of the cloud"),
        (-30, "ok", "30.0 s behind the cloud"),
        (90, "warn", "90.0 s ahead of the cloud"),
        (-1.7e9, "warn", "1,700,000,000.0 s behind the cloud"),
        (86400, "fail", "86,400.0 s ahead of the cloud"),
        (math.nan, "warn", "sent no time"),
    ],
)
def test_the_clock(ahead_s: float, state: str, seen: str) -> None:
    check = check_clock(ahead_s)
    assert (check.state, bool(check.advice)) == (state, state != "ok")
    assert seen in check.seen


@pytest.mark.parametrize(("low_mb", "none_mb", "state"), [(0, 0, "ok"), (1e12, 0, "warn"), (1e12, 1e12, "fail")])
def test_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, low_mb: float, none_mb: float, state: str) -> None:
    monkeypatch.setattr(doctoring, "LOW_DISK_MB", low_mb)
    monkeypatch.setattr(doctoring, "NO_DISK_MB", none_mb)
    check = check_disk(tmp_path)
    assert (check.state, bool(check.advice)) == (state, state != "ok")


@pytest.mark.parametrize(
    ("facts", "state"),
    [
        ({"LoadState": "not-found", "ActiveState": "inactive"}, "ok"),
        ({"LoadState": "loaded", "ActiveState": "active", "NRestarts": "0"}, "ok"),
        ({"LoadState": "loaded", "ActiveState": "activating", "NRestarts": "7"}, "warn"),
        ({"LoadState": "loaded", "ActiveState": "failed", "NRestarts": "3"}, "fail"),
        ({"LoadState": "loaded", "ActiveState": "inactive", "NRestarts": "0"}, "fail"),
    ],
)
def test_the_service(facts: dict[str, str], state: str) -> None:
    check = interpret_service(facts)
    assert (check.state, bool(check.advice)) == (state, state != "ok")


def test_what_a_task_needs(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[project]\ndependencies = ['numpy>=1', 'nosuch-package>=2,<3']\n")
    check = check_task(tmp_path)
    assert (check.state, check.seen) == ("fail", "needs nosuch-package>=2,<3, has none")
    assert "-m pip install 'nosuch-package>=2,<3', or start the agent with --install-dependencies" in check.advice
    (tmp_path / "pyproject.toml").write_text("[project]\ndependencies = ['numpy>=1']\n")
    assert (check_task(tmp_path).state, check_task(tmp_path).seen) == ("ok", f"{tmp_path.name}: 1 requirement met")
