"""The A/B slots' state on the disk."""

from __future__ import annotations

import dataclasses
import errno
import json

import pytest

from edge_agent.releases.slots import Installed, ModelSlots, SlotState, held_models, installed_models, open_slots
from edgefl.errors import HomeError, ManifestRejected
from edgefl.protocols.messages import BlobRef, RolloutNote

INSTALLED = Installed(version=3, blob=BlobRef(sha256="ab", size=5))


def test_a_state_survives(tmp_path):
    state = SlotState(
        model="digits", active="b", slots={"b": INSTALLED}, sequence=4, trying=5, tries=1,
        outcome=RolloutNote(model="digits", version=3, state="active"),
    )  # fmt: skip
    ModelSlots(tmp_path, "digits").save(state)
    [again] = installed_models(tmp_path)
    assert again.state == state
    assert again.state.spare == "a"
    assert again.state.serving == INSTALLED


def test_a_new_model_begins_in_slot_a(tmp_path):
    slots = ModelSlots(tmp_path, "digits")
    assert (slots.state.active, slots.state.spare, slots.state.serving) == (None, "a", None)
    assert slots.path("a").parent.is_dir()
    assert installed_models(tmp_path) == []  # nothing is known of it yet
    assert installed_models(tmp_path / "none") == []


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", ".hidden", "x" * 65, "a\nb"])
def test_a_model_name_is_never_a_path(tmp_path, name):
    with pytest.raises(ManifestRejected):
        ModelSlots(tmp_path, name)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"model": 3}'])
def test_a_damaged_state_says_what_to_do(tmp_path, text):
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "state.json").write_text(text)
    with pytest.raises(HomeError, match="to have the release sent again"):
        ModelSlots(tmp_path, "digits")


def test_those_whose_state_cannot_be_read_are_left_out_and_said(tmp_path, caplog):
    ModelSlots(tmp_path, "digits").save(SlotState(model="digits"))
    (tmp_path / "faces").mkdir()
    (tmp_path / "faces" / "state.json").write_text("{")
    assert [slots.state.model for slots in installed_models(tmp_path)] == ["digits"]
    assert "release.state_damaged model=faces" in caplog.text
    assert held_models(tmp_path) == ["digits", "faces"]


def test_a_damaged_state_is_set_aside(tmp_path):
    (tmp_path / "digits" / "state.json").mkdir(parents=True)
    assert open_slots(tmp_path, "digits").state == SlotState(model="digits")
    open_slots(tmp_path, "digits").save(SlotState(model="digits", sequence=3))
    assert open_slots(tmp_path, "digits").state.sequence == 3
    assert len(list((tmp_path / "digits").glob("state.damaged-*"))) == 1


@pytest.mark.parametrize(
    "state", [{"active": "c"}, {"slots": {"x": {"version": 1, "blob": {"sha256": "a", "size": 1}}}}]
)
def test_slots_that_there_are_not_are_damage(tmp_path, state):
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "state.json").write_text(json.dumps({"model": "digits", **state}))
    with pytest.raises(HomeError, match="expected a and b"):
        ModelSlots(tmp_path, "digits")


def test_what_a_full_disk_does_not_take_is_known_to_this_process(tmp_path, monkeypatch):
    slots = ModelSlots(tmp_path, "digits")

    def full(_path, _data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("edge_agent.releases.slots.replace_file", full)
    noted = dataclasses.replace(slots.state, sequence=7)
    slots.note(noted)
    assert slots.state == noted
    with pytest.raises(OSError, match="No space left"):  # what must be durable before it counts
        slots.save(dataclasses.replace(noted, active="a"))
    assert slots.state == noted
    assert ModelSlots(tmp_path, "digits").state.sequence == -1
