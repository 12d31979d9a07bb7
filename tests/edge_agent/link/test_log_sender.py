"""The agent's answer to a request for its log."""

from __future__ import annotations

import asyncio

import pytest

from edge_agent.link import log_sender
from edge_agent.link.log_sender import LOG_FILE, LogSender
from edgefl.protocols.messages import LogWanted


class Channel:
    """Records what is uploaded; the first upload fails if `broken`."""

    def __init__(self, *, broken=False):
        self.sent, self.broken = [], broken

    async def send_log(self, request, text, *, cut):
        if self.broken:
            self.broken = False
            raise OSError("the disk")
        self.sent.append((request, text, cut))


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr(log_sender, "PAUSE_S", 0.0)
    (tmp_path / LOG_FILE).write_text("one job=job-1\ntwo token=efl1.abc.00\n")
    return tmp_path


async def answers(home, channel, *wanted):
    sender = LogSender(home, channel)
    running = asyncio.create_task(sender.run())
    for one in wanted:
        sender.handle(one)
        await asyncio.sleep(0.05)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    return channel.sent


def test_the_end_of_the_log_is_uploaded_without_secrets(home):
    wanted = [LogWanted(request="r", lines=1), LogWanted(request="s", lines=9, job="job-1")]
    assert asyncio.run(answers(home, Channel(), *wanted)) == [
        ("r", b"two token=***", True), ("s", b"one job=job-1", False),
    ]  # fmt: skip


def test_an_upload_that_fails_costs_that_request_only(home):
    wanted = [LogWanted(request=name, lines=9) for name in ("r", "s")]
    assert [one[0] for one in asyncio.run(answers(home, Channel(broken=True), *wanted))] == ["s"]


def test_requests_that_come_too_fast_are_dropped(home, monkeypatch):
    monkeypatch.setattr(log_sender, "PAUSE_S", 30.0)
    wanted = [LogWanted(request=str(number), lines=9) for number in range(5)]
    assert [one[0] for one in asyncio.run(answers(home, Channel(), *wanted))] == ["0"]
