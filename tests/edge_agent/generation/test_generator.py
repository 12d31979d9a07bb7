"""Tokens whatever happens to the tail: they are those of the whole model in this process."""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest

from edge_agent.generation import generator as module
from edge_agent.generation.api_error import ApiError
from edge_agent.generation.generator import Generator, TextJob
from edgefl.offload.generation.blocks import numpy_engine
from edgefl.offload.generation.generate import load_part
from edgefl.offload.generation.sampling import Sampling
from tests.edge_agent.generation.conftest import all_of

PROMPT = list(b"once upon a time")
GREEDY, DRAWN = Sampling(), Sampling(temperature=0.9, top_p=0.9, seed=11)


def job(num=20, sampling=GREEDY, prompt=PROMPT):
    return TextJob(prompt=prompt, max_tokens=num, sampling=sampling)


@pytest.mark.parametrize("form", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
def test_tokens_are_the_whole_model_s(generating, expected, form, sampling) -> None:
    async def run():
        async with generating(form) as (generator, tail):
            tokens = await all_of(generator.tokens(job(sampling=sampling)))
            await generator.close()
            return tokens, tail

    tokens, tail = asyncio.run(run())
    if form == "fp32":
        assert tokens == expected(PROMPT, 20, sampling)
    assert len(tokens) == 20
    assert [len(one.hidden) for one in tail.requests] == [16, *[1] * 19, 0]
    assert tail.requests[-1].ends
    assert tail.sequences == {}


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN])
@pytest.mark.parametrize("fault", ["cut", "die", "forget", "lose", ("ABORTED", "gone"), ("UNAVAILABLE", "down")])
def test_whatever_happens_ten_times_the_tokens_are_the_same(generating, expected, fault, sampling) -> None:
    async def run():
        async with generating("fp16") as (generator, _):
            undisturbed = await all_of(generator.tokens(job(40, sampling)))
        async with generating("fp16") as (generator, tail):
            tail.faults = dict.fromkeys(range(2, 50, 5), fault)
            seen = await all_of(generator.tokens(job(40, sampling)))
            assert tail.faults == {} or max(tail.faults) >= len(tail.requests)
            return undisturbed, seen, generator.num_replays

    undisturbed, seen, replays = asyncio.run(run())
    assert seen == undisturbed
    assert replays >= (0 if fault in {"cut", "lose"} else 8)  # the tail still has the sequence after a cut


def test_a_long_prompt_is_sent_in_pieces_also_again(generating, expected, monkeypatch) -> None:
    monkeypatch.setattr(module, "PREFILL_ROWS", 7)

    async def run():
        async with generating() as (generator, tail):
            tail.faults = {2: "cut", 9: "die"}
            return await all_of(generator.tokens(job())), tail.requests

    tokens, requests = asyncio.run(run())
    assert tokens == expected(PROMPT, 20, GREEDY)
    assert [one.wants_token for one in requests[:3]] == [False, False, True]
    assert max(len(one.hidden) for one in requests) == 7


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (("RESOURCE_EXHAUSTED", "no room"), 429, "tail_full"),
        (("FAILED_PRECONDITION", "other digest"), 503, "tail_of_another_split"),
        (("INVALID_ARGUMENT", "bad"), 400, "tail_refused"),
        (("NOT_FOUND", "no such model"), 503, "tail_refused"),
    ],
)
def test_refusals_are_errors_of_the_api(generating, fault, status, code) -> None:
    async def run():
        async with generating() as (generator, tail):
            tail.faults = {0: fault}
            with pytest.raises(ApiError, match=fault[1]) as refused:
                await all_of(generator.tokens(job()))
            return refused.value

    error = asyncio.run(run())
    assert (error.status, error.code) == (status, code)


def test_a_full_tail_in_mid_text_is_waited_for(generating, expected) -> None:
    async def run():
        async with generating() as (generator, tail):
            tail.faults = {4: "forget", 5: ("RESOURCE_EXHAUSTED", "full"), 6: ("RESOURCE_EXHAUSTED", "full")}
            return await all_of(generator.tokens(job()))

    assert asyncio.run(run()) == expected(PROMPT, 20, GREEDY)


def test_a_tail_that_stays_away_is_an_error_after_a_while(generating, monkeypatch) -> None:
    monkeypatch.setattr(module, "STALL_S", 0.3)

    async def run():
        async with generating() as (generator, tail):
            tail.faults = dict.fromkeys(range(3, 1000), "die")
            with pytest.raises(ApiError, match=r"no token within 0\.3 s, 4 requests into the text: .*cut") as refused:
                await all_of(generator.tokens(job()))
            return refused.value

    error = asyncio.run(run())
    assert (error.status, error.code) == (503, "tail_unreachable")


def test_a_text_that_nobody_wants_any_more_ends_at_the_tail(generating) -> None:
    async def run():
        async with generating() as (generator, tail):
            async with contextlib.aclosing(generator.tokens(job())) as tokens:
                async for _ in tokens:
                    break
            await generator.close()
            assert tail.sequences == {}
            assert tail.requests[-1].ends

    asyncio.run(run())


def test_values_that_the_format_cannot_hold_are_told(generating, monkeypatch) -> None:
    async def run():
        async with generating("fp16") as (generator, _):
            monkeypatch.setattr(generator._head, "run", lambda hidden, rows: hidden * 1e6)
            with pytest.raises(ApiError, match=r"fp16 cannot hold.*use bf16"):
                await all_of(generator.tokens(job()))

    asyncio.run(run())


def test_a_whole_model_needs_no_tail(folders, expected) -> None:
    async def run():
        with ThreadPoolExecutor(1) as worker:
            generator = Generator(load_part(folders / "whole", numpy_engine()), worker, None)
            return await all_of(generator.tokens(job(sampling=DRAWN)))

    assert asyncio.run(run()) == expected(PROMPT, 20, DRAWN)


def test_too_little_memory_is_an_error_of_that_text(folders, monkeypatch) -> None:
    async def run():
        with ThreadPoolExecutor(1) as worker:
            part = load_part(folders / "whole", numpy_engine())
            monkeypatch.setattr(part, "run", lambda *_: (_ for _ in ()).throw(MemoryError))
            with pytest.raises(ApiError, match="too little memory for the keys and values") as refused:
                await all_of(Generator(part, worker, None).tokens(job()))
            return refused.value.status

    assert asyncio.run(run()) == 503
