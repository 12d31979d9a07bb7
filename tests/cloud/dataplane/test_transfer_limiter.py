import asyncio

import pytest

from cloud.dataplane.transfer_limiter import TransferLimiter


async def transfer(turnstile, name, log, done):
    async with turnstile.turn(name):
        log.append(f"{name} in")
        await done.wait()
    log.append(f"{name} out")


def test_a_third_waits_for_the_first_to_end():
    async def run():
        turnstile, log = TransferLimiter(turns=2, turn_s=60), []
        ends = [asyncio.Event() for _ in range(3)]
        async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
            for name, end in zip("abc", ends, strict=True):
                tasks.create_task(transfer(turnstile, name, log, end))
            await asyncio.sleep(0.02)
            assert log == ["a in", "b in"]
            for end in ends:
                end.set()
        assert log[2:] == ["a out", "b out", "c in", "c out"]

    asyncio.run(run())


def test_a_slow_one_gives_its_turn_on_and_takes_no_second_one_back():
    async def run():
        turnstile, log = TransferLimiter(turns=1, turn_s=0.02), []
        slow, fast = asyncio.Event(), asyncio.Event()
        async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
            tasks.create_task(transfer(turnstile, "slow", log, slow))
            await asyncio.sleep(0.05)
            tasks.create_task(transfer(turnstile, "fast", log, fast))
            await asyncio.sleep(0.01)
            assert log == ["slow in", "fast in"]
            slow.set()
            await asyncio.sleep(0.05)
            fast.set()
        async with asyncio.timeout(5), turnstile.turn("other"):  # one turn is left, neither none nor two
            assert turnstile._turns.locked()

    asyncio.run(run())


def test_those_inside_are_bounded():
    async def run():
        turnstile, log = TransferLimiter(turns=1, turn_s=0.001, max_inside=2), []
        ends = [asyncio.Event() for _ in range(3)]
        async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
            for name, end in zip("abc", ends, strict=True):
                tasks.create_task(transfer(turnstile, name, log, end))
            await asyncio.sleep(0.05)
            assert log == ["a in", "b in"]
            for end in ends:
                end.set()
        assert "c out" in log

    asyncio.run(run())


def test_a_transfer_that_does_not_move_is_ended_and_one_that_does_is_not():
    async def run():
        turnstile = TransferLimiter(turns=1, turn_s=0.001, stall_s=0.1)
        async with asyncio.timeout(5), turnstile.turn("a") as moving:
            for _ in range(5):
                await asyncio.sleep(0.05)
                moving.moved()
        with pytest.raises(TimeoutError):
            async with turnstile.turn("b"):
                await asyncio.sleep(5)

    asyncio.run(run())


def test_the_newest_transfers_of_a_device_cut_off_its_oldest_only():
    async def run():
        turnstile, log, never = TransferLimiter(turns=9, max_each=2), [], asyncio.Event()

        async def hold(name, device):
            try:
                await transfer_as(turnstile, name, device, log, never)
            except TimeoutError:
                log.append(f"{name} cut off")

        async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
            for name, device in (("other", "b"), ("first", "a"), ("second", "a"), ("third", "a")):
                tasks.create_task(hold(name, device))
                await asyncio.sleep(0.01)
            assert log == ["other in", "first in", "second in", "third in", "first cut off"]
            never.set()

    asyncio.run(run())


async def transfer_as(turnstile, name, device, log, done):
    async with turnstile.turn(device):
        log.append(f"{name} in")
        await done.wait()
