"""The server's side of a tail that others start: who is believed, and what ends a connection. Ranks: test_ranks.py."""

from __future__ import annotations

import asyncio
import logging

import pytest

from cloud.generation.joined_tail import JoinedTail
from cloud.generation.tail_process import TailSpec
from cloud.generation.wire import TailUp, packed
from edgefl.errors import ConfigError
from edgefl.offload.generation.stage_info import read_stage
from tests.cloud.generation.test_tail_process import BODY, STEP, Heard
from tests.language_models import write_stages

WAIT_S = 60.0


async def made(socket):
    """Wait until the socket is there: the server has no event for it."""
    async with asyncio.timeout(WAIT_S):
        while not socket.exists():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.mark.timeout(300)
def test_other_stages_second_processes_and_stuck_steps_are_told(tmp_path, caplog) -> None:
    write_stages(tmp_path, 1)
    socket = tmp_path / "tail.sock"
    caplog.set_level(logging.INFO)

    def said(digest):
        return packed(TailUp(pid=1, digest=digest)) if digest else b"nothing of ours"

    async def ended(reader):
        return await asyncio.wait_for(reader.read(), WAIT_S)

    async def run():
        digest = read_stage(tmp_path / "tail").digest
        spec = TailSpec(folder=tmp_path / "tail", digest=digest, run_s=0.2)
        heard = Heard()
        process = JoinedTail(socket, spec, heard)
        running = asyncio.create_task(process.run())
        await made(socket)
        assert "no process has connected to" in process.reason
        for other in ("0" * 64, ""):
            reader, writer = await asyncio.open_unix_connection(socket)
            writer.write(said(other))
            assert await ended(reader) == b""
            writer.close()
        assert heard.events.empty()  # they were never this tail
        reader, writer = await asyncio.open_unix_connection(socket)
        writer.write(said(digest))
        assert await heard.events.get() == "up"
        second, other = await asyncio.open_unix_connection(socket)
        other.write(said(digest))
        assert await ended(second) == b""  # and the first one stays
        other.close()
        process.send(STEP, BODY)
        assert await heard.events.get() == "a step took longer than 0.2 s"
        assert not process.is_up
        writer.close()
        reader, writer = await asyncio.open_unix_connection(socket)
        writer.write(said(digest))
        assert await heard.events.get() == "up"
        running.cancel()  # with a connection, for which the server must not wait
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(running, WAIT_S)
        assert await ended(reader) == b""
        writer.close()
        assert not socket.exists()

    asyncio.run(run())
    assert "another process has connected; stop one of them" in caplog.text
    assert "its processes have the stage 0000000000000000..., this server has" in caplog.text
    assert "a message between server and tail has a header of" in caplog.text


def test_a_socket_that_cannot_be_made_is_refused(tmp_path) -> None:
    async def run():
        tail = JoinedTail(tmp_path / "none" / "tail.sock", TailSpec(folder=tmp_path), Heard())
        with pytest.raises(ConfigError, match=r"--join .*tail.sock: a socket cannot be made there"):
            await tail.run()

    asyncio.run(run())


def test_what_is_at_the_path_stays(tmp_path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()

    async def run():
        for name in ("file", "folder"):
            with pytest.raises(ConfigError, match="it is no socket; choose another path"):
                await JoinedTail(tmp_path / name, TailSpec(folder=tmp_path), Heard()).run()
        first = asyncio.create_task(JoinedTail(tmp_path / "s", TailSpec(folder=tmp_path), Heard()).run())
        await made(tmp_path / "s")
        with pytest.raises(ConfigError, match="another server has it; stop that one"):
            await JoinedTail(tmp_path / "s", TailSpec(folder=tmp_path), Heard()).run()
        assert (tmp_path / "s").exists()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first

    asyncio.run(run())
    assert (tmp_path / "file").read_text() == "mine"
