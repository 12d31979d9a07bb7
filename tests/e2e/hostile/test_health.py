"""Health names the part that is not well while it is not, and nothing that a device said meanwhile is lost."""

import contextlib
import hashlib
import json
import sqlite3
import threading

import httpx
import pytest

from edgefl.operator.client import CloudClient, load_credentials
from edgefl.protocols import tls, topics
from edgefl.protocols.mqtt import LinkConfig
from edgefl.protocols.tls import Identity
from tests.threaded import Link

LONGEST_S = 60


@pytest.fixture
def health(fleet):
    """`health()`: status code and body; anybody may ask."""
    context = tls.client_context(fleet.home / "tls" / "ca.pem")
    with httpx.Client(base_url=fleet.url, verify=context, trust_env=False, timeout=30) as http:

        def ask():
            answer = http.get("/v1/health")
            return answer.status_code, answer.json()

        yield ask


def until(holds):
    """Look again and again, for a minute at most."""
    never = threading.Event()
    for _ in range(10 * LONGEST_S):
        if holds():
            return
        never.wait(0.1)
    raise AssertionError("not within a minute")


def ailing(health):
    code, body = health()
    found = {name for name, part in body["parts"].items() if not part["ok"]}
    assert (code, body["status"]) == ((503, "failing") if found else (200, "ok"))
    assert all(bool(part["reason"]) != part["ok"] for part in body["parts"].values())
    return found


def test_a_locked_database_is_named_and_no_note_is_lost(fleet, three, health, round_is_right):
    three(fleet)
    home = fleet.enroll("speaker")
    note = {"model": "m", "version": 1, "state": "failed", "detail": "said while the database was locked"}
    rollout = start_rollout(fleet, "speaker")
    config = LinkConfig(
        url=f"mqtts://127.0.0.1:{fleet.mqtt_port}", client_id="speaker", identity=Identity.in_folder(home)
    )
    assert ailing(health) == set()
    with contextlib.closing(sqlite3.connect(fleet.home / "cloud.db")) as other:
        other.execute("BEGIN IMMEDIATE")
        with Link(config, on_failure=pytest.fail) as link:
            assert link.wait_connected(20)
            link.publish(topics.up("speaker", "rollout"), json.dumps(note).encode())
            fleet.cloud.wait_for("inbox.waits inbox=rollout-notes")
            assert ailing(health) == {"database"}
            assert "locked" in health()[1]["parts"]["database"]["reason"]
        other.rollback()
    until(lambda: rollout()["devices"][0]["detail"] == note["detail"])
    until(lambda: ailing(health) == set())
    round_is_right(fleet)


def start_rollout(fleet, device):
    """Roll a release of some bytes out to a device; returns what asks for the rollout."""
    data = b"bytes that no device is to load"
    with CloudClient(None, load_credentials(fleet.credentials)) as client:
        client.publish("m", client.put_blob(data, hashlib.sha256(data).hexdigest()), {})
        started = client.start_rollout("m", None, [f"name:{device}"])["id"]

    def ask():
        with CloudClient(None, load_credentials(fleet.credentials)) as client:
            return client.rollout(started)

    return ask


@pytest.mark.parametrize("fleet", ["external"], indirect=True)
def test_a_broker_that_is_gone_is_named_until_it_is_back(fleet, three, health, round_is_right):
    three(fleet)
    assert ailing(health) == set()
    fleet.kill_broker()
    until(lambda: ailing(health) == {"link", "broker"})
    fleet.start_broker()
    until(lambda: ailing(health) == set())
    until(lambda: fleet.command("devices", "list").count("\tonline\t") == 3)
    round_is_right(fleet)


@pytest.mark.parametrize("fleet", ["mosquitto"], indirect=True)
def test_a_broker_of_its_own_that_is_killed_is_named_and_started_again(fleet, three, health, round_is_right):
    three(fleet)
    assert (ailing(health), health()[1]["broker"]) == (set(), "mosquitto")
    seen = fleet.cloud.num_lines()
    fleet.kill_broker()
    fleet.cloud.wait_for("broker.ended status=-9", after=seen)
    fleet.cloud.wait_for("mqtt.up", after=seen)
    until(lambda: ailing(health) == set())
    until(lambda: fleet.command("devices", "list").count("\tonline\t") == 3)
    round_is_right(fleet)
