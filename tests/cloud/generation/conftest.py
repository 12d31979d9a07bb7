"""A tail that computes in the test's own process, when the test's loop turns, and a device's head beside it."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

import pytest

from cloud.generation.sessions import SessionLimits
from cloud.generation.tail import LanguageTail, TailLimits
from cloud.generation.tail_main import Tail
from cloud.generation.tail_process import TailSpec
from edgefl.offload.generation.blocks import Rows, numpy_engine
from edgefl.offload.generation.generate import load_part
from edgefl.offload.generation.sampling import Sampling
from edgefl.protocols.inference.sequences import SequenceRequest, encode_hidden
from tests.language_models import SPEC, write_stages


class InlineProcess:
    """The real computation of a tail's process, without one. `held` keeps steps until the test lets them go."""

    def __init__(self, spec, callbacks) -> None:
        self._spec, self._callbacks = spec, callbacks
        self.is_up, self.reason, self.pid = False, "it is starting", 1
        self.first_load = asyncio.get_running_loop().create_future()
        self.steps, self.held, self.is_held = [], [], False
        self.step_s = 0.0  # that a step takes

    async def run(self) -> None:
        self.come_up()
        await asyncio.Event().wait()

    def come_up(self) -> None:
        self._tail = Tail(load_part(self._spec.folder, numpy_engine()))
        self.is_up, self.reason = True, ""
        if not self.first_load.done():
            self.first_load.set_result(None)
        self._callbacks.came_up()

    def send(self, step, body) -> None:
        assert self.is_up
        self.steps.append(step)
        if self.is_held:
            self.held.append((step, body))
        else:
            asyncio.get_running_loop().call_later(self.step_s, self._compute, step, body)

    def release(self) -> None:
        self.is_held, held = False, self.held
        self.held = []
        for step, body in held:
            self._compute(step, body)

    def die(self) -> None:
        self.is_up, self.reason = False, "it was killed"
        self.held = []
        self._callbacks.lost(self.reason)

    def _compute(self, step, body) -> None:
        if self.is_up:
            done = self._tail.step(step, body)
            self._callbacks.done(done._replace(seconds=done.seconds + self.step_s))


@dataclass
class Device:
    """A device's head, and its requests to a tail."""

    tail: LanguageTail
    head: object
    name: str = "cam"

    async def tokens(self, prompt, num, sampling=None, sequence="s", form="fp32"):
        """Return tokens, and begin again when the tail says so, as a device does."""
        sampling, found, sent, given = sampling or Sampling(), [], [], list(prompt)
        cache = self.head.new_cache()
        for _ in range(num):
            hidden = encode_hidden(self.head.run(self.head.embed(given), [Rows(cache, len(given))]), form)
            request = SequenceRequest(
                sequence=sequence, hidden=hidden, starts=not sent, position=sum(map(len, sent)),
                max_tokens=len(prompt) + num, sampling=sampling,
            )  # fmt: skip
            sent.append(hidden)
            given = [await self.tail.submit(self.name, request)]
            found += given
        return found


@pytest.fixture
def folders(tmp_path):
    write_stages(tmp_path, 2)
    return tmp_path


@pytest.fixture
def tails(folders):
    """Run a tail; yields it, its process and a maker of devices."""

    @contextlib.asynccontextmanager
    async def run(*, max_sequences=8, prompt_rows=64, **limits):
        processes = []

        def make(*given):
            processes.append(InlineProcess(*given))
            return processes[-1]

        sessions = SessionLimits(**{"context": SPEC.context, "token_bytes": SPEC.cache_bytes(2)} | limits)
        tail = LanguageTail(
            TailSpec(folder=folders / "tail"), TailLimits(max_sequences=max_sequences, prompt_rows=prompt_rows),
            sessions, make,
        )  # fmt: skip
        head = load_part(folders / "head", numpy_engine())
        async with tail.running():
            yield tail, processes[0], lambda name="cam": Device(tail, head, name)

    return run
