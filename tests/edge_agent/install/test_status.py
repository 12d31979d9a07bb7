"""What a home says, without its agent."""

from __future__ import annotations

import datetime
import json
import os

import pytest

from edge_agent.install.status import read_status
from edge_agent.releases.slots import Installed, ModelSlots, SlotState
from edge_agent.store import Outgoing, Store
from edgefl.errors import HomeError
from edgefl.process.home import lock_home
from edgefl.protocols.messages import BlobRef


def test_a_fresh_home(home):
    status = read_status(home)
    assert (status.device, status.running, status.serving_url, status.last_contact) == ("cam-1", False, "", "")
    assert (status.outbox_updates, status.outbox_bytes, status.models) == (0, 0, {})
    left = datetime.datetime.fromisoformat(status.certificate_expires) - datetime.datetime.now(datetime.UTC)
    assert left.days > 300


def test_a_home_with_a_past(home):
    store = Store(home)
    draft = store.draft("j", 1)
    draft.write_bytes(b"12345")
    store.put(Outgoing(job="j", round=1, path=draft, size=5, blake3="", weight=1.0))
    installed = Installed(version=4, blob=BlobRef(sha256="", size=1))
    ModelSlots(home / "models", "digits").save(SlotState(model="digits", active="a", slots={"a": installed}))
    (home / "contact").touch()
    (home / "serving").write_text("http://127.0.0.1:8000")
    with lock_home(home):
        status = read_status(home)
    assert (status.running, status.pid, status.since[:2]) == (True, os.getpid(), "20")
    assert (status.healthy, status.connected, status.training) == (False, False, "")  # it has not written it yet
    assert status.serving_url == "http://127.0.0.1:8000"
    assert status.last_contact
    assert (status.outbox_updates, status.outbox_bytes, status.models) == (1, 5, {"digits": 4})
    assert read_status(home).serving_url == ""  # left behind by an agent that was killed
    store.close()


def test_what_a_running_agent_does_now(home):
    facts = {"pid": os.getpid(), "cloud_reachable": True, "training_job": "job-1", "training_round": 3,
             "placements": {"digits": "split:h fp16, 7 by 10.0.0.1:9450"}}  # fmt: skip
    (home / "live.json").write_text(json.dumps(facts))
    (home / "agent.log").write_text(
        "2026-11-29 17:21:03,713 WARNING edge_agent.x mqtt.down reason=a\n"
        "2026-11-29 17:21:04,713 ERROR   edge_agent.x round.failed reason=b\n    Traceback\n"
        "2026-11-29 17:21:05,713 INFO    edge_agent.x said ERROR level\n"
    )
    with lock_home(home):
        status = read_status(home)
    assert (status.healthy, status.training, status.broker_fault) == (True, "job-1 round 3", "")
    assert status.placements == {"digits": "split:h fp16, 7 by 10.0.0.1:9450"}
    assert status.last_error == "2026-11-29 17:21:04,713 ERROR   edge_agent.x round.failed reason=b"
    later = read_status(home)  # without its agent: only the log still counts
    assert (later.healthy, later.connected, later.training, later.pid) == (False, False, "", 0)
    (home / "live.json").write_text("damaged")
    with lock_home(home):
        assert not read_status(home).healthy


def test_no_home(tmp_path):
    with pytest.raises(HomeError):
        read_status(tmp_path)


def test_a_database_that_is_just_being_made(home):
    (home / "agent.db").touch()
    assert read_status(home).outbox_updates == 0
