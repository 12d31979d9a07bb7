"""Streams to a tail over gRPC: tokens, refusals, and what a lost connection is."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from edge_agent.generation.tail_link import TailAddress, TailLink, TailLost, TailRefused
from edgefl.protocols.inference.sequences import SequenceRequest

ROWS = np.ones((2, 32), np.float32)


def request(**changes):
    return SequenceRequest(**{"sequence": "s", "hidden": ROWS, "starts": True, "max_tokens": 9} | changes)


def test_tokens_refusals_and_cuts(generating) -> None:
    async def run():
        async with generating() as (generator, tail):
            stream = generator._link.open()
            assert 0 <= await stream.send(request(), 30) < 260
            assert await stream.send(request(starts=False, position=2, wants_token=False), 30) is None
            with pytest.raises(TailRefused, match="it has 4, not 9") as refused:
                await stream.send(request(starts=False, position=9), 30)
            assert refused.value.status == "ABORTED"
            tail.faults = {3: "cut"}
            with pytest.raises(TailLost, match="the connection to the tail ended: cut"):
                await stream.send(request(), 30)
            with pytest.raises(TailLost):
                await stream.send(request(), 30)  # the stream is over
            again = generator._link.open()
            assert isinstance(await again.send(request(), 30), int)
            await again.end(request(starts=False, position=2, hidden=ROWS[:0], ends=True))
            assert tail.sequences == {}

    asyncio.run(run())


def test_a_tail_that_is_not_there_or_does_not_answer_is_lost(generating, free_port) -> None:
    async def run():
        link = TailLink(TailAddress(target="127.0.0.1:1", model="m", digest="d", device="cam"))
        with pytest.raises(TailLost, match="the connection to the tail ended"):
            await link.open().send(request(), 30)
        await link.close()
        async with generating() as (generator, tail):
            tail.faults = {0: "hang"}
            stream = generator._link.open()
            with pytest.raises(TailLost, match=r"did not answer within 0\.5 s"):
                await stream.send(request(), 0.5)

    asyncio.run(run())
