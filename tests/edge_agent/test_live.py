"""The file that says what an agent does now: written at changes, valid for one process, and no need of anybody."""

from __future__ import annotations

import asyncio

from edge_agent import live
from edge_agent.live import FILE, LiveFile, LiveState, read_live


async def run_with(file, *steps):
    running = asyncio.create_task(file.run())
    for step in steps:
        await asyncio.sleep(0.05)
        step()
        file.note_change()
    await asyncio.sleep(0.05)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def test_changes_are_written_and_belong_to_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "PAUSE_S", 0.0)
    state = [LiveState(pid=7)]
    seen = []
    steps = [lambda: seen.append(read_live(tmp_path, 7)), lambda: state.append(LiveState(pid=7, training_job="job-1"))]
    asyncio.run(run_with(LiveFile(tmp_path, lambda: state[-1]), *steps))
    assert seen == [LiveState(pid=7)]
    assert read_live(tmp_path, 7) == LiveState(pid=7, training_job="job-1")
    assert read_live(tmp_path, 8) is None


def test_what_has_not_changed_is_not_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr(live, "PAUSE_S", 0.0)
    steps = [(tmp_path / FILE).unlink]
    asyncio.run(run_with(LiveFile(tmp_path, lambda: LiveState(pid=7)), *steps))
    assert read_live(tmp_path, 7) is None


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path):
    asyncio.run(run_with(LiveFile(tmp_path / "none", lambda: LiveState(pid=7)), lambda: None))
    assert read_live(tmp_path / "none", 7) is None
