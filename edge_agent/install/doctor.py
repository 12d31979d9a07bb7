"""`edgefl agent doctor`: checks everything that an agent needs, and reports what is wrong and what to do.

It changes nothing. A check whose prerequisite is missing is skipped: a home that is not enrolled has no cloud to check.
Exit status 1 if a check fails.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import math
import shlex
import shutil
import subprocess
import sys
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
    check_port,
    check_serving,
    check_tls,
    fetch_health,
    peer,
)
from edge_agent.install.units import AGENT, settings_of
from edge_agent.link.parents import FILE as PARENTS_FILE
from edge_agent.link.parents import KnownParents, load_fleet_key, parent_name
from edge_agent.link.profile import SERVING_FILE, Profile, load_profile
from edgefl.errors import HomeError
from edgefl.process.home import home_in_use
from edgefl.process.requirements import needs, requirement_in, requirements_in, unmet
from edgefl.process.version import __version__
from edgefl.protocols import tls
from edgefl.terminal.output import Output, counted, example, json_option
from edgefl.terminal.text import one_line

SERVE_PORT = 8000
LOW_DISK_MB, NO_DISK_MB = 1000, 100
SKEW_WARN_S, AHEAD_FAIL_S = 60.0, 23 * 3600.0  # if the clock is ahead, certificates expire too early
EXPIRY_WARN = datetime.timedelta(days=30)
_ENROL_AGAIN = "Enrol again in another --home, with a new token."
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command(epilog=example("edgefl agent doctor --home /var/lib/edgefl"))
@click.option("--home", type=click.Path(path_type=Path), required=True)
@click.option("--serve-port", default=SERVE_PORT, show_default=True, help="Where the agent serves predictions.")
@click.option("--task", type=click.Path(path_type=Path, file_okay=False, exists=True),
              help="A task's folder: are the packages here that it needs?")  # fmt: skip
@json_option
def doctor(home: Path, serve_port: int, task: Path | None, output: Output) -> None:
    """Check this device and say what to do.

    Checks clock, disk, keys, certificate, cloud, broker, ports and service. Changes nothing.
    """
    checks = [*run_checks(home, serve_port), *([check_task(task)] if task is not None else [])]
    failed = sum(check.state == "fail" for check in checks)
    rows = [(check.check, check.state, check.seen, check.advice) for check in checks]
    output.table(("check", "state", "seen", "what to do"), rows, "", _COLOURS)
    output.line(f"{failed} of {len(checks)} checks failed" if failed else f"nothing fails: {len(checks)} checks")
    facts = [dataclasses.asdict(check) for check in checks]
    output.result({"home": str(home), "ok": not failed, "checks": facts})
    if failed:
        raise click.exceptions.Exit(1)


def run_checks(home: Path, serve_port: int = SERVE_PORT) -> Iterator[Check]:
    """Yield the checks one by one; a network check takes up to a few seconds."""
    try:
        profile = load_profile(home)
    except HomeError as error:
        yield Check(
            check="home", state="fail", seen=str(error), advice="Enrol this device: `edgefl agent enroll --help`."
        )
        return
    yield check_home(home, profile)
    yield check_disk(home)
    identity = None if profile.insecure else tls.Identity.in_folder(home)
    yield check_predictions(home, profile, identity, serve_port)
    yield from check_service()
    if identity is not None:
        yield check_certificate(identity, profile.device)
    if identity is None or _loads(identity):
        yield from check_parents(profile, home, identity)


def check_task(folder: Path) -> Check:
    """Check that the packages are installed that a task needs."""
    requirements = requirements_in(folder)
    if missing := unmet(requirements):
        wanted = " ".join(shlex.quote(requirement_in(one)) for one in missing)
        advice = f"{sys.executable} -m pip install {wanted}, or start the agent with --install-dependencies."
        return Check(check="task", state="fail", seen=needs(missing), advice=advice)
    return Check(check="task", state="ok", seen=f"{folder.name}: {counted(len(requirements), 'requirement')} met")


def check_home(home: Path, profile: Profile) -> Check:
    """Check that the files of the enrolment exist, and that only their owner can read them."""
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


def check_disk(home: Path) -> Check:
    """Check that there is space for models and updates."""
    free_mb = shutil.disk_usage(home).free / 1e6
    state = "fail" if free_mb < NO_DISK_MB else "warn" if free_mb < LOW_DISK_MB else "ok"
    advice = "" if state == "ok" else f"Free space on the disk of {home}: models and updates need {LOW_DISK_MB} MB."
    return Check(check="disk", state=state, seen=f"{free_mb:,.0f} MB free", advice=advice)


def check_predictions(home: Path, profile: Profile, identity: tls.Identity | None, serve_port: int) -> Check:
    """Check the port of predictions: that of the running agent, otherwise the one that it will use."""
    agent_runs = home_in_use(home)
    if agent_runs:
        with suppress(FileNotFoundError):  # it is not serving now
            return check_serving((home / SERVING_FILE).read_text(encoding="ascii"), profile.device, identity)
    return check_port(serve_port, agent_runs=agent_runs)


def check_certificate(identity: tls.Identity, device: str) -> Check:
    """Check that the certificate is from the fleet's CA, for this device's name and key, and valid now."""
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
        return Check(check="certificate", state="fail", seen="not signed by this fleet's CA", advice=again)
    if key.public_key() != cert.public_key():
        return Check(check="certificate", state="fail", seen="the certificate is for another key", advice=again)
    name = tls.common_name(cert.public_bytes(serialization.Encoding.DER))
    if name != device:
        seen = f"the certificate is for {name!r}, but the home is for {device!r}"
        return Check(check="certificate", state="fail", seen=seen, advice=again)
    return _check_dates(cert, again)


def _check_dates(cert: x509.Certificate, again: str) -> Check:
    now, end = datetime.datetime.now(datetime.UTC), cert.not_valid_after_utc
    if now < cert.not_valid_before_utc:
        seen = f"by this clock the certificate is not valid before {cert.not_valid_before_utc:%Y-%m-%d}"
        advice = "Set this device's clock. The agent then gets a certificate that is valid from 1970 on."
        return Check(check="certificate", state="fail", seen=seen, advice=advice)
    if now > end:
        seen = f"the certificate expired on {end:%Y-%m-%d}, if this clock is right"
        return Check(check="certificate", state="fail", seen=seen, advice=f"Check the clock. {again}")
    state = "warn" if end - now < EXPIRY_WARN else "ok"
    soon = "It expires soon. The agent renews it automatically: start it, and check that the data plane answers."
    advice = soon if state == "warn" else ""
    return Check(check="certificate", state=state, seen=f"valid until {end:%Y-%m-%d}", advice=advice)


def check_parents(profile: Profile, home: Path, identity: tls.Identity | None) -> Iterator[Check]:
    """Check every parent in this device's list; of several, one that answers is enough."""
    several = identity is not None and (home / PARENTS_FILE).exists() and (home / "fleet.pub").exists()
    parents = KnownParents(home, profile, load_fleet_key(home)).profiles if several else [profile]
    found = [(one, list(check_cloud(one, home, identity))) for one in parents]
    works = any(all(check.state != "fail" for check in checks) for _, checks in found)
    for parent, checks in found:
        for check in checks:
            if len(parents) == 1:
                yield check
                continue
            named = dataclasses.replace(check, check=f"{check.check} ({parent_name(parent)})")
            is_other = works and check.state == "fail"
            advice = f"{check.advice} Meanwhile the device uses another parent."
            yield dataclasses.replace(named, state="warn", advice=advice) if is_other else named


def check_cloud(profile: Profile, home: Path, identity: tls.Identity | None) -> Iterator[Check]:
    """Check the cloud's three services: HTTPS (with the clock), gRPC, and the broker."""
    health = fetch_health(peer("cloud", profile.cloud_url, identity, profile.server_name))
    if isinstance(health, Health):
        seen = f"{profile.cloud_url} runs edgefl {health.version}"
        if health.ailing:
            advice = "The cloud's operator has to fix it; this device is all right."
            yield Check(check="cloud", state="warn", seen=f"{seen}, but is not healthy: {health.ailing}", advice=advice)
        else:
            yield Check(check="cloud", state="ok", seen=seen)
        yield check_clock(health.ahead_s)
    else:
        yield health
    data_plane, refusal = check_data_plane(profile, home, identity)
    yield data_plane
    broker = check_tls(peer("broker", profile.broker, identity, profile.server_name))
    if broker.state == "ok" and refusal:  # it checks the list of devices after TLS
        seen = f"{profile.broker} answers, but rejects this device: {refusal}"
        broker = Check(check="broker", state="fail", seen=seen, advice=_ENROL_AGAIN)
    yield broker


def check_data_plane(profile: Profile, home: Path, identity: tls.Identity | None) -> tuple[Check, str]:
    """Check the gRPC port; also return why the cloud rejects this device, empty if it does not."""
    reached = check_tls(peer("data plane", profile.grpc, identity, profile.server_name))
    if reached.state != "ok":
        return reached, ""
    answer, reason = asyncio.run(_ask_next(profile, home))
    match answer:
        case "OK":
            return dataclasses.replace(reached, seen=f"{reached.seen}; the cloud accepts this device"), ""
        case "PERMISSION_DENIED":
            return Check(check="data plane", state="fail", seen=reason, advice=_ENROL_AGAIN), reason
        case "RESOURCE_EXHAUSTED":
            advice = "The agent retries automatically; the cloud's operator can raise its limits."
            return Check(check="data plane", state="warn", seen=reason, advice=advice), ""
    seen = f"{profile.grpc} accepts connections, but does not answer like a data plane: {answer}, {reason}"
    advice = "Check that this is the cloud's --grpc-port; its log may say more."
    return Check(check="data plane", state="fail", seen=seen, advice=advice), ""


async def _ask_next(profile: Profile, home: Path) -> tuple[str, str]:
    """Call `Next` as the agent does; return the name of gRPC's status code, and the cloud's reason."""
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


def check_clock(ahead_s: float) -> Check:
    """Check the difference between this device's clock and the cloud's."""
    if math.isnan(ahead_s):
        return Check(check="clock", state="warn", seen="the cloud sent no time to compare", advice="Update it.")
    off_s = abs(ahead_s)
    state = "fail" if ahead_s > AHEAD_FAIL_S else "warn" if off_s > SKEW_WARN_S else "ok"
    seen = f"{off_s:,.1f} s {'ahead of' if ahead_s > 0 else 'behind'} the cloud"
    why = "while it is ahead, certificates expire too early" if ahead_s > 0 else "log lines have wrong times"
    advice = "" if state == "ok" else f"Set it: `timedatectl set-ntp true`; {why}."
    return Check(check="clock", state=state, seen=seen, advice=advice)


def check_service() -> Iterator[Check]:
    """Check the systemd unit, if there is one."""
    systemctl = shutil.which("systemctl")
    if systemctl is None or not Path("/run/systemd/system").is_dir():
        return
    shown = subprocess.run(
        [systemctl, "show", AGENT, "--property=LoadState,ActiveState,NRestarts"],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    yield interpret_service(settings_of(shown.stdout))


def interpret_service(facts: dict[str, str]) -> Check:
    """Interpret the output of `systemctl show`."""
    if facts.get("LoadState") != "loaded":
        return Check(check="service", state="ok", seen="not installed as a service (`edgefl agent install` does it)")
    seen = f"{AGENT} is {facts.get('ActiveState', '?')}, restarted {facts.get('NRestarts', '?')} times"
    state = {"active": "ok", "activating": "warn", "reloading": "warn"}.get(facts.get("ActiveState", ""), "fail")
    advice = "" if state == "ok" else "`journalctl -u edgefl-agent -n 50` says why; `systemctl restart edgefl-agent`."
    return Check(check="service", state=state, seen=seen, advice=advice)


def _loads(identity: tls.Identity) -> bool:
    """Whether the certificate files can be loaded; if not, the check of the certificate has reported it."""
    try:
        tls.client_context(identity.ca, identity)
    except OSError:
        return False
    return True
