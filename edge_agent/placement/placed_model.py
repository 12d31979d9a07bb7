"""A model that is placed on this device and in the cloud: the head runs here, the tail behind a stage server.

A request with several rows goes in parts, if its rows do not depend on each other: while one is in the cloud, another
is on the link and a third runs here. If the cloud does not answer in time, the fall-back does, and the response says
so; then a circuit breaker keeps requests from a tail that fails. In a cascade the fall-back answers first, and only
the rows of which it is not sure go on. Used in the serving process's event loop; models run where `Compute` runs them.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from edge_agent.placement.breaker import BreakerRules, CircuitBreaker
from edge_agent.placement.confidence import confident_rows
from edge_agent.placement.link_meter import LinkMeter
from edge_agent.placement.tail_client import TailCall, TailClient, TailFailed
from edge_agent.serving.board import label_of
from edge_agent.sessions import LoadedModel
from edgefl.errors import ProtocolError
from edgefl.models.tensors import TensorInfo
from edgefl.protocols.inference.placement import DEVICE, FALLBACK, Offload, Placement, head_name
from edgefl.protocols.inference.service import tail_name
from edgefl.trees import Array, Tree

PARTS = 4  # of one request that are on their way at the same time
RESERVE = 3.0  # times the fall-back's own run is kept free of a request's time
LEAST_RESERVE_S = 0.005
KEPT = 256  # latencies for the median
PROBE_BYTES = 64 << 10  # at most, of a probe where another placement has fewer

Compute = Callable[[LoadedModel, Sequence[str], Mapping[str, Array]], Awaitable[list[Array]]]


class Unanswered(Exception):
    """The cloud did not answer, and there is no fall-back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacedOutputs:
    """What a request gets."""

    results: list[Array]  # in the order of the names that were asked for
    parameters: Mapping[str, Any]  # of the response: who computed it


@dataclass(slots=True)
class Counts:
    """What became of requests so far."""

    remote: int = 0  # a tail had a part in the answer
    local: int = 0  # the whole model here
    fallback: int = 0
    cascade_rows: int = 0  # rows of which the small model was sure
    refused: int = 0
    reasons: Counter[str] = field(default_factory=Counter)  # why the fall-back answered, or nobody
    latencies_ms: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacedRelease:
    """What is known of a release that is placed."""

    name: str
    version: int
    digest: str  # of the whole model
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    offload: Offload
    candidates: tuple[Placement, ...]  # among which this device chooses, the first for the start


class PlacedModel:
    """One version of a model; has what `edge_agent.serving.inference` needs of a `LoadedModel`."""

    inline = False

    def __init__(
        self, release: PlacedRelease, parts: Mapping[str, LoadedModel], tail: TailClient, draws: random.Random
    ) -> None:  # fmt: skip
        """`parts` are by the names of `Offload.parts`."""
        self.release, self.name, self.version = release, release.name, release.version
        self.inputs, self.outputs = release.inputs, release.outputs
        self.tail, self.parts = tail, parts
        self.meter, self.counts = LinkMeter(), Counts()
        self.breaker = CircuitBreaker(BreakerRules(), draws)
        self.current = release.candidates[0]
        self.label = label_of(release.name)
        self._active, self._idle = 0, asyncio.Event()
        self._idle.set()
        self._fallback = parts.get(FALLBACK)
        self._whole = next((parts[head_name(one.layers)] for one in release.candidates if one.name == DEVICE), None)

    @cached_property
    def input_infos(self) -> Mapping[str, TensorInfo]:
        """The inputs by name."""
        return {one.name: one for one in self.inputs}

    @cached_property
    def output_types(self) -> Mapping[str, str]:
        """The outputs' datatypes by name."""
        return {one.name: one.datatype for one in self.outputs}

    @cached_property
    def cached_headers(self) -> dict[bytes, Any]:
        """The cache of `edge_agent.serving.inference`."""
        return {}

    async def infer(
        self, names: Sequence[str], feeds: Tree, timeout_s: float | None, compute: Compute
    ) -> PlacedOutputs:  # fmt: skip
        """Compute outputs; raises Unanswered if the cloud does not answer in time and nothing here can instead.

        `timeout_s` is the request's own; None = the release's. Raises ProtocolError for values that no part takes.
        """
        begun_s = time.monotonic()
        default_s = self.release.offload.timeout_ms / 1e3
        request = _PlacedRequest(self, names, feeds, begun_s + (timeout_s or default_s), compute)
        request.counts_time = (timeout_s or default_s) >= default_s
        self._active += 1
        self._idle.clear()
        try:
            found = await request.answer()
        finally:
            self._active -= 1
            if not self._active:
                self._idle.set()
        self.counts.latencies_ms.append(1e3 * (time.monotonic() - begun_s))
        return found

    async def close(self) -> None:
        """Close the connection to the stage server, after the requests in progress."""
        await self._idle.wait()
        await self.tail.close()

    async def probe(self, sample: Tree, timeout_s: float, compute: Compute) -> None:
        """Send a sample through a placement with a tail, for the breaker and the meter.

        It is the current one, or that with the most bytes up to a limit: few bytes do not show how fast a link is.
        """
        remote = [one for one in self.release.candidates if one.form]
        if not remote:
            return
        small = [one for one in remote if one.up_bytes <= PROBE_BYTES]
        placement = self.current
        if not placement.form:
            placement = max(small, key=lambda one: one.up_bytes) if small else min(remote, key=lambda one: one.up_bytes)
        try:
            self.meter.note_ping(await self.tail.ping_ms(timeout_s))
            names = [one.name for one in self.outputs]
            request = _PlacedRequest(self, names, sample, time.monotonic() + timeout_s, compute)
            await request.remote(placement, sample)
            if placement.head is None and self._whole is not None:  # else nobody would see that the device is free
                await request.whole(self._whole)
        except (TailFailed, ProtocolError) as error:
            self.breaker.failed(time.monotonic(), str(error), at_once=True)

    def reserve_s(self) -> float:
        """Return how much of a request's time is kept for what answers here instead."""
        model = self._fallback or self._whole
        if model is None:
            return 0.0
        return max(RESERVE * model.run_s, LEAST_RESERVE_S)

    @property
    def fallback(self) -> LoadedModel | None:
        """The model that answers when the cloud does not; None = the whole model, or nothing."""
        return self._fallback

    @property
    def whole(self) -> LoadedModel | None:
        """The whole model, if this device has it."""
        return self._whole


class _PlacedRequest:
    """One request on its way."""

    def __init__(
        self, model: PlacedModel, names: Sequence[str], feeds: Tree, until_s: float, compute: Compute
    ) -> None:  # fmt: skip
        self._model, self._names, self._feeds = model, names, feeds
        self._until_s, self._compute = until_s, compute
        self.counts_time = True  # whether a deadline that passes is the tail's fault

    async def answer(self) -> PlacedOutputs:
        model, offload = self._model, self._model.release.offload
        placement, counts = model.current, model.counts
        if placement.name == DEVICE and model.whole is not None:
            counts.local += 1
            return self._made(await self.whole(model.whole), DEVICE)
        if not offload.threshold or model.fallback is None:
            found, reason = await self._tried(placement, self._feeds)
            if found is not None:
                counts.remote += 1
                return self._made(found, placement.name)
            return await self._instead(reason)
        return await self._cascade(placement, offload.threshold, model.fallback)

    async def whole(self, model: LoadedModel) -> Tree:
        """Compute all outputs here, and note how long it took."""
        begun_s = time.monotonic()
        here = await self._here(model)
        if _rows(self._feeds) == 1:
            self._model.meter.note_device(1e3 * (time.monotonic() - begun_s), 1e3 * model.run_s)
        return here

    async def _cascade(self, placement: Placement, threshold: float, first: LoadedModel) -> PlacedOutputs:
        """Have the small model answer, and the placement those rows of which it is not sure."""
        import numpy as np

        counts = self._model.counts
        small = await self._small(first)
        sure = confident_rows(small, threshold)
        hard = np.flatnonzero(~sure)
        counts.cascade_rows += int(sure.sum())
        if not len(hard):
            return self._made(small, FALLBACK, cascade_rows=int(sure.sum()))
        feeds = self._feeds if len(hard) == len(sure) else {name: one[hard] for name, one in self._feeds.items()}
        found, reason = await self._tried(placement, feeds)
        if found is None:
            counts.fallback += 1
            counts.reasons[_kind(reason)] += 1
            return self._made(small, FALLBACK, fallback_reason=reason, cascade_rows=int(sure.sum()))
        counts.remote += 1
        merged = {}
        for name, one in small.items():
            merged[name] = np.array(one)
            merged[name][hard] = found[name]
        return self._made(merged, placement.name, cascade_rows=int(sure.sum()))

    async def _tried(self, placement: Placement, feeds: Tree) -> tuple[Tree | None, str]:
        """Return the outputs of a placement with a tail; None and the reason if there are none in time."""
        model = self._model
        left_s = self._until_s - time.monotonic() - model.reserve_s()
        if not model.breaker.allows:
            return None, model.breaker.reason
        if left_s <= 0:
            return None, "the request's time is too short for the cloud"
        try:
            async with asyncio.timeout(left_s):
                return await self.remote(placement, feeds, self._until_s - model.reserve_s()), ""
        except TimeoutError:
            failed = TailFailed(f"no answer within {left_s * 1e3:.0f} ms", status="DEADLINE_EXCEEDED")
        except TailFailed as error:
            failed = error
        is_late = failed.status == "DEADLINE_EXCEEDED"
        if not failed.blames_values and (self.counts_time or not is_late):
            model.breaker.failed(time.monotonic(), str(failed), at_once=failed.at_once)
        return None, str(failed)

    async def remote(self, placement: Placement, feeds: Tree, until_s: float | None = None) -> Tree:
        """Compute all outputs with a tail, in parts that overlap; raises TailFailed, ProtocolError."""
        import numpy as np

        until_s = self._until_s if until_s is None else until_s
        parts = self._parts(feeds)
        if len(parts) == 1:
            found = [await self._sent(placement, *await self._head(placement, feeds), until_s)]
        else:
            places, calls = asyncio.Semaphore(PARTS), list[asyncio.Task[Tree]]()
            try:
                for part in parts:
                    crossing, known = await self._head(placement, part)
                    await places.acquire()
                    call = asyncio.create_task(self._sent(placement, crossing, known, until_s), name="tail")
                    call.add_done_callback(lambda _: places.release())
                    calls.append(call)
                    if any(one.done() and one.exception() for one in calls):
                        break
                found = list(await asyncio.gather(*calls))
            finally:
                for call in calls:
                    call.cancel()
                await asyncio.gather(*calls, return_exceptions=True)
        self._model.breaker.succeeded()
        return {name: found[0][name] if len(found) == 1 else np.concatenate([one[name] for one in found])
                for name in found[0]}  # fmt: skip

    async def _head(self, placement: Placement, feeds: Tree) -> tuple[Tree, Tree]:
        """Return what crosses, and the outputs that are known by then."""
        if placement.head is None:
            return {name: feeds[name] for name in placement.crossing}, {}
        head = self._model.parts[head_name(placement.layers)]
        names = [one.name for one in head.outputs]
        begun_s = time.monotonic()
        made = await self._compute(head, names, {one.name: feeds[one.name] for one in head.inputs})
        if _rows(feeds) == 1:
            self._model.meter.note_device(1e3 * (time.monotonic() - begun_s), 1e3 * head.run_s)
        known = {**feeds, **dict(zip(names, made, strict=True))}
        types = self._model.output_types
        return {name: known[name] for name in placement.crossing}, {
            name: known[name] for name in names if name in types
        }

    async def _sent(self, placement: Placement, crossing: Tree, known: Tree, until_s: float) -> Tree:
        """Return all outputs: those of the tail, and those that are known."""
        model, release = self._model, self._model.release
        call = TailCall(
            model=tail_name(release.name, placement.layers), digest=release.digest, form=placement.form,
            outputs=[one.name for one in release.outputs if one.name not in known],
        )  # fmt: skip
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            raise TailFailed("no time was left behind the head", status="DEADLINE_EXCEEDED")
        answer = await model.tail.infer(call, crossing, left_s)
        rows = _rows(crossing)
        for info in release.outputs:
            if info.name in answer.outputs and not info.fits(answer.outputs[info.name].shape):
                raise TailFailed(
                    f"output {info.name!r} of the tail has shape {list(answer.outputs[info.name].shape)}, expected "
                    f"{list(info.shape)}", status="INTERNAL", at_once=True,
                )  # fmt: skip
        if answer.server_ms is not None:
            model.meter.note_call(answer.num_bytes, answer.total_ms, answer.server_ms)
            if rows == 1:
                model.meter.note_cloud(answer.server_ms, placement.cloud_ms + placement.decode_ms)
        return {**known, **answer.outputs}

    def _parts(self, feeds: Tree) -> list[Tree]:
        rows = _rows(feeds)
        if not self._model.release.offload.divides or rows < 2:
            return [feeds]
        step = math.ceil(rows / (2 * PARTS)) if rows > PARTS else 1
        return [{name: one[at : at + step] for name, one in feeds.items()} for at in range(0, rows, step)]

    async def _instead(self, reason: str) -> PlacedOutputs:
        """Answer here: by the fall-back, else by the whole model."""
        model, counts = self._model, self._model.counts
        counts.reasons[_kind(reason)] += 1
        if model.fallback is not None:
            counts.fallback += 1
            return self._made(await self._small(model.fallback), FALLBACK, fallback_reason=reason)
        if model.whole is not None:
            counts.local += 1
            return self._made(await self._here(model.whole), DEVICE, fallback_reason=reason)
        counts.refused += 1
        raise Unanswered(f"the cloud's part of model {model.name} did not answer, and it has no fall-back: {reason}")

    async def _small(self, small: LoadedModel) -> Tree:
        """Return the outputs of the fall-back: of a small model, or of an exit behind the layers of a cut."""
        model, fallback = self._model, self._model.release.offload.fallback
        feeds = self._feeds
        if fallback is not None and fallback.behind:
            feeds, _ = await self._head(model.release.offload.placement(fallback.behind), feeds)
        return await self._here(small, feeds)

    async def _here(self, model: LoadedModel, feeds: Tree | None = None) -> Tree:
        names, given = [one.name for one in model.outputs], self._feeds if feeds is None else feeds
        made = await self._compute(model, names, {one.name: given[one.name] for one in model.inputs})
        return dict(zip(names, made, strict=True))

    def _made(self, outputs: Tree, by: str, **more: Any) -> PlacedOutputs:
        return PlacedOutputs(results=[outputs[name] for name in self._names], parameters={"placement": by, **more})


def _rows(feeds: Tree) -> int:
    """Return the number of rows; 1 if the tensors have none in common."""
    counts = {len(one) for one in feeds.values() if one.ndim}
    return counts.pop() if len(counts) == 1 else 1


def _kind(reason: str) -> str:
    """Return the beginning of a reason, so that there are few of them."""
    return reason.partition(":")[0][:80]
