"""What a home says, without its agent."""

from __future__ import annotations

import datetime

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
    assert status.running
    assert status.serving_url == "http://127.0.0.1:8000"
    assert status.last_contact
    assert (status.outbox_updates, status.outbox_bytes, status.models) == (1, 5, {"digits": 4})
    assert read_status(home).serving_url == ""  # left behind by an agent that was killed
    store.close()


def test_no_home(tmp_path):
    with pytest.raises(HomeError):
        read_status(tmp_path)
