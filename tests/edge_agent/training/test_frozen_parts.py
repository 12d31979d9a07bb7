"""What is frozen in a job: fetched once, kept while the job lasts."""

from __future__ import annotations

import asyncio

import pytest

from edge_agent.link.channel import CloudChannel
from edge_agent.link.profile import load_profile
from edge_agent.training.frozen_parts import FrozenParts
from edgefl.errors import ProtocolError
from edgefl.protocols.messages import BlobRef

BACKBONE = b"a backbone" * 1000


@pytest.fixture
def with_parts(home):
    def run(function):
        async def inside():
            channel = CloudChannel(load_profile(home), home)
            try:
                return await function(FrozenParts(home, channel))
            finally:
                await channel.close()

        return asyncio.run(inside())

    return run


def downloads(fleet) -> int:
    return len([call for call in fleet.calls if call.startswith("download")])


def test_a_part_is_fetched_once_and_shared_between_jobs(fleet, home, with_parts):
    ref = fleet.blob(BACKBONE)

    async def run(parts):
        paths = [await parts.get(job, ref) for job in ("job-1", "job-1", "job-2")]
        assert all(path.read_bytes() == BACKBONE for path in paths)
        assert parts.jobs() == ["job-1", "job-2"]
        parts.forget("job-1")
        assert (await parts.get("job-2", ref)).read_bytes() == BACKBONE
        assert parts.jobs() == ["job-2"]
        parts.forget("job-2")
        parts.forget("job-2")

    with_parts(run)
    assert downloads(fleet) == 1
    assert not list((home / "frozen").iterdir())


def test_after_a_restart_it_is_there_and_checked_again(fleet, home, with_parts):
    ref = fleet.blob(BACKBONE)

    async def run(parts):
        path = await parts.get("job-1", ref)
        assert path.read_bytes() == BACKBONE
        assert parts.jobs() == ["job-1"]
        return path

    path = with_parts(run)
    before = downloads(fleet)
    with_parts(run)
    assert downloads(fleet) == before  # hashed where it lay
    path.write_bytes(b"damaged on disk" + BACKBONE[15:])
    with_parts(run)
    assert downloads(fleet) == before + 1


def test_a_name_that_is_no_digest_reaches_no_file(with_parts):
    async def run(parts):
        with pytest.raises(ProtocolError, match="expected a SHA-256 in hex"):
            await parts.get("job-1", BlobRef(sha256="../../x", size=1))

    with_parts(run)


def test_what_a_killed_process_left_without_a_jobs_name_is_removed(home, with_parts):
    for name, content in (("half", None), ("empty", "")):
        (home / "frozen" / name).mkdir(parents=True)
        if content is not None:
            (home / "frozen" / name / "job").write_text(content)

    async def run(parts):
        assert parts.jobs() == []

    with_parts(run)
    assert not list((home / "frozen").iterdir())
