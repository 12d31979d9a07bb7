"""`edgefl agent doctor`: checks everything that an agent needs, and says what is wrong and what to do.

It changes nothing, and what cannot be looked at for want of something else is not guessed at: a home
that is not enrolled names no cloud to try. Exit status 1 where something fails.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import math
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import click
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization

from edge_agent.install.probes import (
    MAX_SHOWN_CHARS,
    Check,
    Health,
    ask_health,
    greet,
    look_at_port,
    look_at_serving,
    peer,
)
from edge_agent.install.units import AGENT, settings_of
from edge_agent.link.profile import SERVING_FILE, Profile, load_profile
from edgefl.errors import HomeError
from edgefl.process.home import home_in_use
from edgefl.process.version import __version__
from edgefl.protocols import tls
from edgefl.terminal.output import Output, example, json_option
from edgefl.terminal.text import one_line

SERVE_PORT = 8000
LOW_DISK_MB, NO_DISK_MB = 1000, 100
SKEW_WARN_S, AHEAD_FAIL_S = 60.0, 23 * 3600.0  # by a clock that is ahead, certificates end too early
EXPIRY_WARN = datetime.timedelta(days=30)
_ENROL_AGAIN = "Enrol again in another --home, with a new token."
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command(epilog=example("edgefl agent doctor --home /var/lib/edgefl"))
@click.option("--home", type=click.Path(path_type=Path), required=True)
@click.option("--serve-port", default=SERVE_PORT, show_default=True, help="Where the agent serves predictions.")
@json_option
def doctor(home: Path, serve_port: int, output: Output) -> None:
    """Check this device and say what to do.

    Checks clock, disk, keys, certificate, cloud, broker, ports and service. Changes nothing.
    """
    checks = list(examine(home, serve_port))
    failed = sum(check.state == "fail" for check in checks)
    rows = [(check.check, check.state, check.seen, check.advice) for check in checks]
    output.table(("check", "state", "seen", "what to do"), rows, "", _COLOURS)
    output.line(f"{failed} of {len(checks)} checks failed" if failed else f"nothing fails: {len(checks)} checks")
    facts = [dataclasses.asdict(check) for check in checks]
    output.result({"home": str(home), "ok": not failed, "checks": facts})
    if failed:
        raise click.exceptions.Exit(1)


def examine(home: Path, serve_port: int = SERVE_PORT) -> Iterator[Check]:
    """Yield one check after another; those over the network take up to a few seconds each."""
    try:
        profile = load_profile(home)
    except HomeError as error:
        yield Check(
            check="home", state="fail", seen=str(error), advice="Enrol this device: `edgefl agent enroll --help`."
        )
        return
    yield look_at_home(home, profile)
    yield look_at_disk(home)
    identity = None if profile.insecure else tls.Identity.in_folder(home)
    yield look_at_predictions(home, profile, identity, serve_port)
    yield from look_at_service()
    if identity is not None:
        yield look_at_certificate(identity, profile.device)
    if identity is None or _loads(identity):
        yield from look_at_cloud(profile, home, identity)


def look_at_home(home: Path, profile: Profile) -> Check:
    """Everything that enrolment made is there, and the private things are private."""
    wanted = () if profile.insecure else ("key.pem", "cert.pem", "ca.pem", "fleet.pub")
    if missing := [name for name in wanted if not (home / name).exists()]:
        seen = f"{home} has no {', '.join(missing)}"
        return Check(check="home", state="fail", seen=seen, advice="Restore it, or enrol again in another --home.")
    private = [home, *(home / name for name in wanted if name == "key.pem")]
    if open_to_others := [path for path in private if path.stat().st_mode & 0o077]:
        modes = ", ".join(f"{path} has mode {path.stat().st_mode & 0o777:04o}" for path in open_to_others)
        advice = "; ".join(f"chmod go= {path}" for path in open_to_others)
        return Check(check="home", state="fail", seen=f"{modes}: others may read it", advice=advice)
    return Check(check="home", state="ok", seen=f"{home} is enrolled as {profile.device!r}, keys are private")


def look_at_disk(home: Path) -> Check:
    """There is room for models and updates."""
    free_mb = shutil.disk_usage(home).free / 1e6
    state = "fail" if free_mb < NO_DISK_MB else "warn" if free_mb < LOW_DISK_MB else "ok"
    advice = "" if state == "ok" else f"Make room on the disk of {home}: models and updates need {LOW_DISK_MB} MB."
    return Check(check="disk", state=state, seen=f"{free_mb:,.0f} MB free", advice=advice)


def look_at_predictions(home: Path, profile: Profile, identity: tls.Identity | None, serve_port: int) -> Check:
    """The port of predictions: the agent's own while it serves, else the one that it is to have."""
    agent_runs = home_in_use(home)
    if agent_runs:
        with suppress(FileNotFoundError):  # it does not serve at the moment
            return look_at_serving((home / SERVING_FILE).read_text(encoding="ascii"), profile.device, identity)
    return look_at_port(serve_port, agent_runs=agent_runs)


def look_at_certificate(identity: tls.Identity, device: str) -> Check:
    """Our certificate is of our CA, for our name and key, and of today."""
    again = _ENROL_AGAIN
    try:
        cert = x509.load_pem_x509_certificate(identity.cert.read_bytes())
        key = serialization.load_pem_private_key(identity.key.read_bytes(), None)
        ca = x509.load_pem_x509_certificate(identity.ca.read_bytes())
        cert.verify_directly_issued_by(ca)
    except (OSError, ValueError, TypeError) as error:
        return Check(
            check="certificate", state="fail", seen=f"key or certificate cannot be read: {error}", advice=again
        )
    except InvalidSignature:
        return Check(check="certificate", state="fail", seen="the certificate is not of this fleet's CA", advice=again)
    if key.public_key() != cert.public_key():
        return Check(check="certificate", state="fail", seen="the certificate is for another key", advice=again)
    name = tls.common_name(cert.public_bytes(serialization.Encoding.DER))
    if name != device:
        seen = f"the certificate names {name!r}, the home is of {device!r}"
        return Check(check="certificate", state="fail", seen=seen, advice=again)
    return _look_at_dates(cert, again)


def _look_at_dates(cert: x509.Certificate, again: str) -> Check:
    now, end = datetime.datetime.now(datetime.UTC), cert.not_valid_after_utc
    if now < cert.not_valid_before_utc:
        seen = f"by this clock the certificate begins only on {cert.not_valid_before_utc:%Y-%m-%d}"
        advice = "Set this device's clock. The agent then gets a certificate that begins in 1970."
        return Check(check="certificate", state="fail", seen=seen, advice=advice)
    if now > end:
        seen = f"the certificate expired on {end:%Y-%m-%d}, if this clock is right"
        return Check(check="certificate", state="fail", seen=seen, advice=f"Check the clock. {again}")
    state = "warn" if end - now < EXPIRY_WARN else "ok"
    soon = "It ends soon. The agent renews it by itself: start it, and see that the data plane answers."
    advice = soon if state == "warn" else ""
    return Check(check="certificate", state=state, seen=f"valid until {end:%Y-%m-%d}", advice=advice)


def look_at_cloud(profile: Profile, home: Path, identity: tls.Identity | None) -> Iterator[Check]:
    """Check the cloud's three services: HTTPS, which also tells the time, gRPC, and the broker."""
    health = ask_health(peer("cloud", profile.cloud_url, identity))
    if isinstance(health, Health):
        seen = f"{profile.cloud_url} runs edgefl {health.version}"
        if health.ailing:
            advice = "Its operator has to fix it; nothing is wrong with this device."
            yield Check(check="cloud", state="warn", seen=f"{seen}, but not well: {health.ailing}", advice=advice)
        else:
            yield Check(check="cloud", state="ok", seen=seen)
        yield look_at_clock(health.ahead_s)
    else:
        yield health
    data_plane, refusal = look_at_data_plane(profile, home, identity)
    yield data_plane
    broker = greet(peer("broker", profile.broker, identity))
    if broker.state == "ok" and refusal:  # its own look into the fleet's list comes after TLS
        seen = f"{profile.broker} answers, but not to this device: {refusal}"
        broker = Check(check="broker", state="fail", seen=seen, advice=_ENROL_AGAIN)
    yield broker


def look_at_data_plane(profile: Profile, home: Path, identity: tls.Identity | None) -> tuple[Check, str]:
    """Return how the gRPC port is, and why the cloud does not take this device; empty where it may."""
    reached = greet(peer("data plane", profile.grpc, identity))
    if reached.state != "ok":
        return reached, ""
    answer, reason = asyncio.run(_ask_next(profile, home))
    match answer:
        case "OK":
            return dataclasses.replace(reached, seen=f"{reached.seen}; the cloud knows this device"), ""
        case "PERMISSION_DENIED":
            return Check(check="data plane", state="fail", seen=reason, advice=_ENROL_AGAIN), reason
        case "RESOURCE_EXHAUSTED":
            advice = "The agent tries again by itself; the cloud's operator can make room."
            return Check(check="data plane", state="warn", seen=reason, advice=advice), ""
    seen = f"{profile.grpc} takes connections, but does not answer as a data plane does: {answer}, {reason}"
    advice = "Check that this is the cloud's --grpc-port; its operator looks at its log."
    return Check(check="data plane", state="fail", seen=seen, advice=advice), ""


async def _ask_next(profile: Profile, home: Path) -> tuple[str, str]:
    """Ask as the agent does; return the name of gRPC's status code, and what the cloud says to it."""
    import grpc

    from edge_agent.link.channel import CloudChannel

    channel = CloudChannel(profile, home)
    try:
        await channel.next(__version__)
    except grpc.aio.AioRpcError as error:
        return error.code().name, one_line(error.details() or "it gave no reason", MAX_SHOWN_CHARS)
    finally:
        await channel.close()
    return "OK", ""


def look_at_clock(ahead_s: float) -> Check:
    """The device's clock is near the cloud's."""
    if math.isnan(ahead_s):
        return Check(check="clock", state="warn", seen="the cloud named no time to compare with", advice="Update it.")
    off_s = abs(ahead_s)
    state = "fail" if ahead_s > AHEAD_FAIL_S else "warn" if off_s > SKEW_WARN_S else "ok"
    seen = f"{off_s:,.1f} s {'ahead of' if ahead_s > 0 else 'behind'} the cloud"
    why = "by a clock that is ahead, certificates end too early" if ahead_s > 0 else "log lines are dated wrongly"
    advice = "" if state == "ok" else f"Set it: `timedatectl set-ntp true`; {why}."
    return Check(check="clock", state=state, seen=seen, advice=advice)


def look_at_service() -> Iterator[Check]:
    """The systemd unit, where there is one."""
    systemctl = shutil.which("systemctl")
    if systemctl is None or not Path("/run/systemd/system").is_dir():
        return
    shown = subprocess.run(
        [systemctl, "show", AGENT, "--property=LoadState,ActiveState,NRestarts"],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    yield read_service(settings_of(shown.stdout))


def read_service(facts: dict[str, str]) -> Check:
    """Say what `systemctl show` means."""
    if facts.get("LoadState") != "loaded":
        return Check(check="service", state="ok", seen="not installed as a service (`edgefl agent install` does it)")
    seen = f"{AGENT} is {facts.get('ActiveState', '?')}, restarted {facts.get('NRestarts', '?')} times"
    state = {"active": "ok", "activating": "warn", "reloading": "warn"}.get(facts.get("ActiveState", ""), "fail")
    advice = "" if state == "ok" else "`journalctl -u edgefl-agent -n 50` says why; `systemctl restart edgefl-agent`."
    return Check(check="service", state=state, seen=seen, advice=advice)


def _loads(identity: tls.Identity) -> bool:
    """Whether TLS can start at all; where it cannot, the check of the certificate has said why."""
    try:
        tls.client_context(identity.ca, identity)
    except OSError:
        return False
    return True
