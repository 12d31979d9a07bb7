"""Sequences of several devices at a tail whose computation is real: tokens, batches, limits, and what is lost."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from cloud.generation.wire import StepDone
from cloud.stages.work import RequestRefused
from edgefl.errors import ProtocolError
from edgefl.offload.generation.blocks import numpy_engine
from edgefl.offload.generation.generate import generate, load_part
from edgefl.offload.generation.sampling import Sampling
from edgefl.protocols.inference.sequences import SequenceRequest

ROW = np.ones((1, 32), np.float32)
PROMPTS = [list(b"hello"), list(b"a much longer prompt than the others, in several pieces" * 2), [7], list(b"xyz")]


def expected(folders, prompt, num, sampling=None):
    parts = [load_part(folders / one, numpy_engine()) for one in ("head", "tail")]
    return list(generate(parts, prompt, num, sampling or Sampling()))


def request(**changes):
    return SequenceRequest(**{"sequence": "s", "hidden": ROW, "starts": True, "max_tokens": 10} | changes)


def test_sequences_that_are_decoded_together_get_the_tokens_that_they_get_alone(tails, folders) -> None:
    samplings = [Sampling(), Sampling(temperature=0.8, top_p=0.9, seed=4), Sampling(), Sampling(temperature=1, seed=1)]

    async def run():
        async with tails() as (_, process, device):
            process.step_s = 0.1  # much longer than the heads take
            seen = await asyncio.gather(*(
                device(f"d{number}").tokens(prompt, 20, sampling)
                for number, (prompt, sampling) in enumerate(zip(PROMPTS, samplings, strict=True))
            ))  # fmt: skip
            return seen, [len(step.items) for step in process.steps]

    seen, sizes = asyncio.run(run())
    assert seen == [expected(folders, *given) for given in zip(PROMPTS, [20] * 4, samplings, strict=True)]
    assert sizes.count(4) > 10  # all of them in one step, and they stay together
    assert len(sizes) < 4 * 20


def test_a_new_sequence_joins_between_two_steps(tails, folders) -> None:
    async def run():
        async with tails() as (_, process, device):
            process.step_s = 0.1
            first = asyncio.create_task(device("a").tokens(PROMPTS[0], 30))
            while len(process.steps) < 5:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            second = await device("b").tokens(PROMPTS[1], 5)
            return await first, second, any(len(step.items) == 2 for step in process.steps)

    first, second, met = asyncio.run(run())
    assert (first, second) == (expected(folders, PROMPTS[0], 30), expected(folders, PROMPTS[1], 5))
    assert met


def test_another_device_s_sequence_and_one_that_is_over_are_refused(tails) -> None:
    async def run():
        async with tails() as (tail, _, _device):
            await tail.submit("a", request())
            with pytest.raises(RequestRefused, match="'s' of device b is not here") as refused:
                await tail.submit("b", request(starts=False, position=1))
            assert refused.value.status == "ABORTED"
            assert await tail.submit("a", request(starts=False, ends=True, position=1, hidden=ROW[:0])) is None
            with pytest.raises(RequestRefused, match="is not here"):
                await tail.submit("a", request(starts=False, position=1))
            assert len(tail.sessions) == 0

    asyncio.run(run())


def test_a_repeated_request_gets_the_same_token_and_a_gap_is_refused(tails) -> None:
    async def run():
        async with tails() as (tail, process, _):
            await tail.submit("a", request())
            token = await tail.submit("a", request(starts=False, position=1))
            num = len(process.steps)
            assert await tail.submit("a", request(starts=False, position=1)) == token
            assert len(process.steps) == num  # it was not computed again
            with pytest.raises(RequestRefused, match="has 2 tokens here, the request continues behind 5") as refused:
                await tail.submit("a", request(starts=False, position=5))
            assert refused.value.status == "ABORTED"
            for change, words in (
                ({"max_tokens": 300}, "may get 300 tokens; the context has 256"),
                ({"hidden": np.ones((11, 32), np.float32)}, "has 11 rows; max_tokens is 10"),
                ({"starts": False, "position": 2, "hidden": np.ones((9, 32), np.float32)}, "it would have 11"),
            ):
                with pytest.raises(RequestRefused, match=words):
                    await tail.submit("a", request(**change))

    asyncio.run(run())


def test_a_sequence_that_begins_again_replaces_the_one_that_is_computed(tails) -> None:
    async def run():
        async with tails() as (tail, process, _):
            process.is_held = True
            first = asyncio.create_task(tail.submit("a", request()))
            await asyncio.sleep(0)
            with pytest.raises(RequestRefused, match="is being computed") as refused:
                await tail.submit("a", request(starts=False))
            assert refused.value.status == "ABORTED"
            second = asyncio.create_task(tail.submit("a", request()))
            await asyncio.sleep(0)
            process.release()
            with pytest.raises(RequestRefused, match="was begun again"):
                await first
            assert isinstance(await second, int)
            third = await tail.submit("a", request(starts=False, position=1))
            assert isinstance(third, int)

    asyncio.run(run())


def test_a_process_that_ends_refuses_what_it_had_and_the_next_one_serves_again(tails, folders) -> None:
    async def run():
        async with tails() as (tail, process, device):
            process.is_held = True
            lost = asyncio.create_task(tail.submit("a", request()))
            await asyncio.sleep(0)
            process.die()
            with pytest.raises(RequestRefused, match="the tail's process ended: it was killed") as refused:
                await lost
            assert refused.value.status == "UNAVAILABLE"
            waiting = asyncio.create_task(device("b").tokens(PROMPTS[0], 5))
            await asyncio.sleep(0)
            process.is_held = False
            process.come_up()
            return await waiting

    assert asyncio.run(run()) == expected(folders, PROMPTS[0], 5)


def test_a_device_whose_prompts_end_the_process_twice_is_refused_for_a_while(tails) -> None:
    async def run():
        async with tails() as (tail, process, _):
            for _ in range(2):
                process.is_held = True
                lost = asyncio.create_task(tail.submit("a", request()))
                await asyncio.sleep(0)
                process.die()
                with pytest.raises(RequestRefused, match="process ended"):
                    await lost
                process.is_held = False
                process.come_up()
            with pytest.raises(RequestRefused, match="its requests are refused for") as refused:
                await tail.submit("a", request())
            assert refused.value.status == "RESOURCE_EXHAUSTED"
            assert isinstance(await tail.submit("b", request()), int)

    asyncio.run(run())


def test_a_client_that_is_gone_leaves_its_sequence_usable(tails) -> None:
    async def run():
        async with tails() as (tail, process, _):
            process.is_held = True
            gone = asyncio.create_task(tail.submit("a", request()))
            waiting = asyncio.create_task(tail.submit("b", request()))
            await asyncio.sleep(0)
            for task in (gone, waiting):  # one is computed, one waits
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            process.release()
            assert isinstance(await tail.submit("a", request(starts=False, position=1)), int)
            with pytest.raises(RequestRefused, match="has 0 tokens here"):
                await tail.submit("b", request(starts=False, position=1))

    asyncio.run(run())


def test_leases_end_and_free_their_memory(tails) -> None:
    async def run():
        async with tails(lease_s=0.5) as (tail, _, _device):
            await tail.submit("a", request())
            while len(tail.sessions):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            with pytest.raises(RequestRefused, match="is not here"):
                await tail.submit("a", request(starts=False, position=1))

    asyncio.run(run())


def test_a_thousand_sequences_of_one_device_leave_room_for_another(tails, folders) -> None:
    async def run():
        async with tails(of_device=8) as (tail, _, device):
            done = await asyncio.gather(
                *(tail.submit("hostile", request(sequence=str(number))) for number in range(1000)),
                return_exceptions=True,
            )
            assert sum(isinstance(one, int) for one in done) == 8
            assert sum(isinstance(one, RequestRefused) and one.status == "RESOURCE_EXHAUSTED" for one in done) == 992
            return await device("b").tokens(PROMPTS[0], 5)

    assert asyncio.run(run()) == expected(folders, PROMPTS[0], 5)


def test_results_of_another_step_are_refused_and_nobody_is_forgotten(tails):
    """A process that says nonsense is ended: whoever waits for the step hears of it."""

    async def run():
        async with tails() as (tail, process, _):
            process.is_held = True
            waiting = asyncio.create_task(tail.submit("a", request()))
            await asyncio.sleep(0)  # it begins, and sends its step
            assert process.held
            for tokens, errors in (([1, 2], ["", ""]), ([], []), ([1], [])):
                with pytest.raises(ProtocolError, match=f"results of {len(tokens)} sequences, expected 1"):
                    tail.done(StepDone(step=1, tokens=tokens, errors=errors))
            process.die()
            with pytest.raises(RequestRefused, match="the tail's process ended"):
                await waiting

    asyncio.run(run())
