"""Probes against real sockets: our cloud, another fleet's, none, a mute one, expired ones, wrong clocks."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import http.server
import json
import math
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_agent.install import probes
from edge_agent.install.probes import Check, Health, Peer, check_port, check_serving, check_tls, fetch_health, peer
from edge_agent.serving.api import Serving, bind, url_of
from edge_agent.sessions import Models
from edgefl.protocols import tls
from edgefl.protocols.tls import Identity


def new_fleet(folder: Path, *hosts: str) -> tuple[Identity, Identity]:
    """Return the identities of a new fleet's cloud and of a device of it."""
    cloud, device = folder / "cloud", folder / "device"
    cloud.mkdir(parents=True)
    device.mkdir()
    tls.create_ca(cloud)
    tls.issue_server(cloud, Identity.in_folder(cloud), hosts or ("localhost", "127.0.0.1"))
    mine = Identity.in_folder(device)
    mine.cert.write_bytes(tls.sign_request(cloud, tls.new_request(mine, "pi-4"), "pi-4"))
    mine.ca.write_bytes((cloud / "ca.pem").read_bytes())
    return Identity.in_folder(cloud), mine


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Identity, Identity]:
    return new_fleet(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> tuple[Identity, Identity]:
    return new_fleet(tmp_path_factory.mktemp("other"))


@contextlib.contextmanager
def health_server(context: ssl.SSLContext | None, **facts: Any) -> Iterator[int]:
    """Answer GET /v1/health as a cloud does, or with `body` as it stands."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            stated = {"status": "ok", "version": "9.9", "time": time.time(), **facts}
            body = facts["body"] if "body" in facts else json.dumps(stated).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            pass  # a client that does not trust us hangs up

    with Server(("127.0.0.1", 0), Handler) as server:
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), name="health server of the test")
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join(10)


@contextlib.contextmanager
def tls_server(context: ssl.SSLContext | None, *, speaks: bytes = b"", hangs_up: bool = False) -> Iterator[int]:
    """Accept connections one after another, say a word where there is one, and wait for the client to go."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    raw, _ = listener.accept()
                except OSError:
                    return
                with raw, contextlib.suppress(OSError):
                    raw.settimeout(10)
                    with context.wrap_socket(raw, server_side=True) if context else raw as connection:
                        connection.sendall(speaks)
                        if not hangs_up:
                            connection.recv(100)

        thread = threading.Thread(target=serve, name="tls server of the test")
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def at(port: int, identity: Identity | None, host: str = "localhost") -> Peer:
    return Peer(check="cloud", host=host, port=port, identity=identity)


def failure(check: object) -> str:
    assert isinstance(check, Check)
    assert check.state == "fail"
    assert check.advice
    return check.seen


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        ("https://c.example:9480", "c.example", 9480),
        ("mqtts://[::1]:8883", "::1", 8883),
        ("10.0.0.9:9440", "10.0.0.9", 9440),
        ("[::1]:9440", "::1", 9440),
    ],
)
def test_addresses_as_a_home_holds_them(address: str, host: str, port: int) -> None:
    found = peer("cloud", address, None)
    assert (found.host, found.port) == (host, port)


# --- health -----------------------------------------------------------------------------------------------------


def test_our_cloud_is_well(fleet: tuple[Identity, Identity]) -> None:
    cloud, device = fleet
    with health_server(tls.server_context(cloud, client_certificates=False)) as port:
        health = fetch_health(at(port, device))
    assert isinstance(health, Health)
    assert health.version == "9.9"
    assert abs(health.ahead_s) < 2


def test_a_loopback_trial_has_no_tls() -> None:
    with health_server(None) as port:
        assert isinstance(fetch_health(at(port, None)), Health)


def iso(offset_s: float) -> str:
    return (datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=offset_s)).isoformat()


@pytest.mark.parametrize(
    ("stated", "ahead_s"),
    [(lambda: time.time() - 3600, 3600), (lambda: iso(7200), -7200), (lambda: None, 0), (lambda: "noon", math.nan)],
)
def test_a_wrong_clock_is_measured(stated: Any, ahead_s: float) -> None:
    with health_server(None, time=stated()) as port:
        health = fetch_health(at(port, None))
    assert isinstance(health, Health)
    assert health.ahead_s == pytest.approx(ahead_s, abs=5, nan_ok=True)


def test_a_clock_years_off_is_told_as_a_wrong_clock_and_no_bad_certificate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cloud's certificate begins in a month, by our clock: only then does everything else make sense."""
    now = datetime.datetime.now(datetime.UTC)
    monkeypatch.setattr(tls, "BEGIN", now + datetime.timedelta(days=30))
    cloud, device = new_fleet(tmp_path)
    month_s = 30 * 86400
    with health_server(tls.server_context(cloud, client_certificates=False), time=time.time() + month_s) as port:
        health = fetch_health(at(port, device))
        assert isinstance(health, Health)
        assert health.ahead_s == pytest.approx(-month_s, abs=5)
        assert "not yet valid by this device's clock" in failure(check_tls(at(port, device)))


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"null", b'{"status":"ok"}'])
def test_another_web_server_is_no_cloud(body: bytes) -> None:
    with health_server(None, body=body) as port:
        assert "not like an edgefl cloud" in failure(fetch_health(at(port, None)))


def test_what_speaks_no_http_is_no_cloud() -> None:
    with tls_server(None, speaks=b"SSH-2.0-OpenSSH\r\n\r\n") as port:
        assert "does not speak HTTP" in failure(fetch_health(at(port, None)))


# --- every door -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probe", [fetch_health, check_tls])
def test_another_fleets_cloud_is_told(probe: Any, fleet: Any, other: Any) -> None:
    with tls_server(tls.server_context(other[0], client_certificates=False)) as port:
        assert "a certificate that this fleet's CA did not sign" in failure(probe(at(port, fleet[1])))


@pytest.mark.parametrize("probe", [fetch_health, check_tls])
def test_a_closed_port_is_told(probe: Any, fleet: Any) -> None:
    port = closed_port()
    assert failure(probe(at(port, fleet[1]))) == f"nothing listens on localhost:{port}"


@pytest.mark.parametrize("probe", [fetch_health, check_tls])
def test_an_unknown_name_is_told(probe: Any, fleet: Any) -> None:
    assert "the name 'no-such-host.invalid' cannot be resolved" in failure(
        probe(at(1, fleet[1], "no-such-host.invalid"))
    )


@pytest.mark.parametrize("probe", [fetch_health, check_tls])
def test_a_mute_port_costs_one_deadline(probe: Any, fleet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "DEADLINE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        assert "did not answer within 0.2 s" in failure(probe(at(port, fleet[1])))


@pytest.mark.parametrize("probe", [fetch_health, check_tls])
def test_a_port_without_tls_is_told(probe: Any, fleet: Any) -> None:
    with tls_server(None, speaks=b"220 mail ready\r\n") as port:
        assert f"TLS with localhost:{port} failed" in failure(probe(at(port, fleet[1])))


@pytest.mark.parametrize("probe", [fetch_health, check_tls])
def test_a_certificate_for_another_host_is_told(probe: Any, tmp_path: Path) -> None:
    cloud, device = new_fleet(tmp_path, "elsewhere.example")
    with tls_server(tls.server_context(cloud, client_certificates=False)) as port:
        assert failure(probe(at(port, device))) == "the cloud's certificate does not name 'localhost'"


# --- mutual TLS -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("speaks", [b"\0\0\0\4", b""], ids=["like gRPC", "like a broker"])
def test_a_service_that_takes_our_certificate_is_well(fleet: Any, speaks: bytes) -> None:
    cloud, device = fleet
    with tls_server(tls.server_context(cloud, client_certificates=True), speaks=speaks) as port:
        check = check_tls(at(port, device))
    assert check.state == "ok", check
    assert check.seen.startswith(f"localhost:{port} accepts this device's certificate, TLSv1.3, ")


def test_a_service_that_hangs_up_after_the_handshake_is_not_well(fleet: Any) -> None:
    with tls_server(tls.server_context(fleet[0], client_certificates=True), hangs_up=True) as port:
        seen = failure(check_tls(at(port, fleet[1])))
    assert seen.startswith(f"localhost:{port} closes the connection without an error")


def test_a_service_without_tls_is_well_on_loopback() -> None:
    with tls_server(None) as port:
        assert check_tls(at(port, None)) == Check(
            check="cloud", state="ok", seen=f"localhost:{port} answers, without TLS"
        )


def test_a_service_that_does_not_know_us_is_told(fleet: Any, other: Any) -> None:
    posing = Identity(key=other[1].key, cert=other[1].cert, ca=fleet[1].ca)
    with tls_server(tls.server_context(fleet[0], client_certificates=True)) as port:
        seen = failure(check_tls(at(port, posing)))
    assert seen == f"localhost:{port} refuses this device's certificate as of another fleet"


def test_an_expired_certificate_of_ours_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cloud, device = new_fleet(tmp_path)
    late = Identity.in_folder(tmp_path / "late")
    late.key.parent.mkdir()
    monkeypatch.setattr(tls, "LEAF_DAYS", -1)
    late.cert.write_bytes(tls.sign_request(tmp_path / "cloud", tls.new_request(late, "pi-4"), "pi-4"))
    expired = Identity(key=late.key, cert=late.cert, ca=device.ca)
    with tls_server(tls.server_context(cloud, client_certificates=True)) as port:
        assert failure(check_tls(at(port, expired))).endswith("refuses this device's certificate as expired")


def test_an_expired_certificate_of_the_clouds_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "LEAF_DAYS", -1)
    cloud, device = new_fleet(tmp_path)
    monkeypatch.undo()
    with tls_server(tls.server_context(cloud, client_certificates=False)) as port:
        assert failure(check_tls(at(port, device))) == (
            f"the certificate of localhost:{port} is expired by this device's clock"
        )


# --- the serving port -------------------------------------------------------------------------------------------


def test_a_free_port_is_free() -> None:
    port = closed_port()
    assert check_port(port, agent_runs=False) == Check(check="serving port", state="ok", seen=f"{port} is free")


def test_our_own_agent_may_have_it() -> None:
    with health_server(None, body=b'{"name":"edgefl"}') as port:
        assert check_port(port, agent_runs=True).state == "ok"
        assert f"{port} is used by edgefl" in failure(check_port(port, agent_runs=False))


@pytest.mark.parametrize("body", [b'{"name":"triton"}', b"<html>", b"[]"])
def test_another_program_may_not(body: bytes) -> None:
    with health_server(None, body=body) as port:
        assert f"{port} is used by " in failure(check_port(port, agent_runs=True))


def test_a_program_that_speaks_something_else_may_not() -> None:
    with tls_server(None, speaks=b"220 mail ready\r\n\r\n") as port:
        assert f"{port} is used by another program" in failure(check_port(port, agent_runs=True))


def test_a_port_that_asks_for_a_token_is_our_agents() -> None:
    async def look() -> Check:
        listener = bind("127.0.0.1", 0)
        port = listener.getsockname()[1]
        serving = Serving(Models(), listener)
        serving.token = "a-token-of-this-device"  # noqa: S105 - of a test
        running = asyncio.create_task(serving.run())
        seen = await asyncio.to_thread(check_port, port, agent_runs=True)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return seen

    seen = asyncio.run(look())
    assert seen.state == "ok"


@pytest.mark.parametrize("with_token", [True, False])
@pytest.mark.parametrize("secure", [True, False])
def test_an_agent_that_serves_is_found_where_it_noted_it(fleet: Any, secure: bool, with_token: bool) -> None:
    async def look() -> Check:
        listener = bind("0.0.0.0", 0)  # noqa: S104 - as a device does whose predictions others ask for
        serving = Serving(Models(), listener)
        serving.token = "a-token-of-this-device" if with_token else ""
        if secure:
            serving.context = lambda: tls.server_context(fleet[1], client_certificates=True)
        running = asyncio.create_task(serving.run())
        seen = await asyncio.to_thread(check_serving, url_of(listener, secure=secure), "pi-4", fleet[1])
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return seen

    seen = asyncio.run(look())
    assert seen.state == "ok", seen
    assert f"serves this agent's predictions{' to clients with the token' if with_token else ''}" in seen.seen


def test_an_agent_that_serves_elsewhere_than_it_noted_is_told(fleet: Any) -> None:
    url = f"http://127.0.0.1:{closed_port()}"
    assert failure(check_serving(url, "pi-4", None)).startswith(f"the agent serves at {url}, which does not answer")
    with health_server(None, body=b'{"name":"triton"}') as port:
        url = f"http://127.0.0.1:{port}"
        assert failure(check_serving(url, "pi-4", None)) == f"the agent serves at {url}, but triton answers there"


def test_a_port_that_takes_connections_and_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "DEADLINE_S", 0.2)
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert "does not answer within 0.2 s" in failure(check_port(port, agent_runs=True))
        assert f"{port} is used by another program" in failure(check_port(port, agent_runs=False))


def test_a_cloud_that_is_not_well_is_said_on_one_line() -> None:
    parts = {"link": {"ok": True, "reason": ""}, "disk": {"ok": False, "reason": "3 MB\x1b[2J\nare free"}}
    with health_server(None, parts=parts) as port:
        health = fetch_health(peer("cloud", f"http://127.0.0.1:{port}", None))
    assert isinstance(health, Health)
    assert health.ailing == "disk: 3 MB\\x1b[2J are free"


@pytest.mark.parametrize("facts", [{"parts": []}, {"parts": {"link": 3}}, {"time": 10**400}, {"body": b"[" * 50_000}])
def test_no_answer_of_a_cloud_trips_the_doctor(facts: dict[str, Any]) -> None:
    with health_server(None, **facts) as port:
        assert isinstance(fetch_health(peer("cloud", f"http://127.0.0.1:{port}", None)), Health | Check)
