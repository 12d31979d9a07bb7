"""A removed device's certificate at another device's serving port: a real cloud, a real agent, real TLS."""

import re
import ssl

import httpx
import pytest

from edge_agent.install.doctor import run_checks
from edgefl.protocols import tls

EVERYWHERE = "0.0.0.0"  # noqa: S104 - what a guard is for
REFUSED = (httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError, httpx.WriteError)


def client_of(fleet, name):
    """Return an HTTP client that shows a device's certificate."""
    home = fleet.folder / name
    context = tls.client_context(home / "ca.pem", tls.Identity.in_folder(home))
    return httpx.Client(verify=context, trust_env=False, timeout=30)


def ask(client, url):
    return client.get(f"{url}/v2", extensions={"sni_hostname": "server.device.edgefl.internal"}).json()["name"]


def ask_to_the_end(client, url):
    """Ask over the connection that there is, which is to end, and then over a new one."""
    while ask(client, url):
        pass


def serve(fleet):
    """Start the agent that serves; return it and where."""
    agent = fleet.start_agent("server", "--serve-host", EVERYWHERE, "--serve-tls")
    agent.wait_for("agent.started")
    *_, url = re.findall(r"serves=(\S+)", agent.log.read_text())  # the last start is the one that runs
    return agent, url.replace(EVERYWHERE, "127.0.0.1")


def test_a_removed_device_is_refused_from_the_next_contact_on_and_while_the_cloud_is_gone(embedded_fleet):
    fleet = embedded_fleet
    for name in ("server", "stays", "removed"):
        fleet.enroll(name)
    agent, url = serve(fleet)
    agent.wait_for("revoked.kept")
    with client_of(fleet, "stays") as stays, client_of(fleet, "removed") as removed:
        assert ask(stays, url) == ask(removed, url) == "edgefl"
        fleet.command("devices", "remove", "removed", "--cloud", fleet.url)
        fleet.cloud.stop()
        after = agent.num_lines()
        fleet.start_cloud()
        agent.wait_for("revoked.kept certificates=1", after=after)
        with pytest.raises(REFUSED):
            ask_to_the_end(removed, url)
        assert ask(stays, url) == "edgefl"
    fleet.cloud.stop()
    assert agent.stop() == 0
    agent, url = serve(fleet)  # without a cloud, by the list that it has kept
    with client_of(fleet, "stays") as stays, client_of(fleet, "removed") as removed:
        assert ask(stays, url) == "edgefl"
        with pytest.raises((*REFUSED, ssl.SSLError)):
            ask(removed, url)


def test_the_doctor_of_a_removed_device_says_so_at_the_broker_too(embedded_fleet):
    home = embedded_fleet.enroll("removed")
    before = {check.check: check for check in run_checks(home, 1)}
    assert [before[name].state for name in ("cloud", "data plane", "broker")] == ["ok", "ok", "ok"]
    embedded_fleet.command("devices", "remove", "removed", "--cloud", embedded_fleet.url)
    after = {check.check: check for check in run_checks(home, 1)}
    assert [after[name].state for name in ("cloud", "data plane", "broker")] == ["ok", "fail", "fail"]
    assert "not enrolled, or not with this certificate" in after["data plane"].seen
    told = ("not enrolled, or not with this certificate", "certificate as revoked")  # by the cloud, by the broker
    assert any(words in after["broker"].seen for words in told)
    for name in ("data plane", "broker"):
        assert "new token" in after[name].advice
