"""Requests through the stages: queued, merged into batches, in every stage at the same time, and back.

A request enters at one of the `entries`, usually the first stage: a device that has more of the model itself enters at
a later one. A batch has a slot of the shared memory until the last stage. A stage is given one batch to compute and
one to begin with next. If a batch of several requests fails, each of them is computed alone, so that the one that is
at fault fails alone. If a stage's process ends, the requests that it computed are refused with UNAVAILABLE; those
that wait, or are in other stages, go on when it is back. A device whose requests were computed alone when the process
ended, twice within a minute, is refused for a minute.
Invariant: every request is settled by its deadline, and every slot is given back once.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from cloud.beside.suspects import Suspects
from cloud.servers import unwrapped
from cloud.stages.fair_queue import BatchRule, FairQueue
from cloud.stages.slots import Placed, Slots
from cloud.stages.stage_process import BatchCallbacks, StageFacts, StageProcess, StageSpec
from cloud.stages.work import Output, Part, RequestRefused, StageRequest
from edgefl.errors import ConfigError
from edgefl.models.tensors import TensorInfo
from edgefl.protocols.inference.tensors import dtype_of
from edgefl.trees import Array

DEPTH = 2  # batches that a stage's process has at a time
TRIM_S = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineLimits:
    """How much may wait, and how it is merged."""

    rule: BatchRule = field(default_factory=BatchRule)
    slot_bytes: int = 256 << 20  # of one batch with everything that is computed from it
    device_requests: int = 64  # of one device, waiting or computed
    device_bytes: int = 256 << 20
    all_bytes: int = 1 << 30  # of all devices
    request_s: float = 60.0  # time limit of a request without a shorter one


@dataclass(eq=False, slots=True)
class _Batch:
    """Parts on their way through the stages."""

    number: int
    parts: list[Part]
    begin: int  # of its slot
    end: int
    tensors: dict[str, Placed]
    free: int  # where the next tensor is written
    stage: int = 0


@dataclass(slots=True)
class _DeviceLoad:
    requests: int = 0
    num_bytes: int = 0


class Pipeline:
    """The stages of one model. Used in the event loop only."""

    def __init__(
        self, name: str, specs: Sequence[StageSpec], limits: PipelineLimits,
        make_stage: Callable[[int, StageSpec, Slots, BatchCallbacks], StageProcess] = StageProcess, *,
        entries: Sequence[int] = (0,), outputs: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """`entries` are the stages (from 0) at which requests begin; `outputs` are what they get of what is made there.

        By default, requests begin at the first stage and get what the last one returns.
        """
        self.name, self._limits, self._wanted = name, limits, outputs
        self._loop = asyncio.get_running_loop()
        self._slots = Slots(DEPTH * len(specs) + 1, limits.slot_bytes)
        self._stages = [make_stage(number, spec, self._slots, self) for number, spec in enumerate(specs, 1)]
        self._queues = {entry: FairQueue(limits.rule) for entry in sorted(entries)}
        self._waiting: list[deque[_Batch]] = [deque() for _ in specs]  # before each stage but the first
        self._turns = [False for _ in specs]  # of each stage: whether a batch that begins there is next
        self._batches: dict[int, _Batch] = {}  # that a stage has
        self._numbers = itertools.count(1)
        self._loads: dict[str, _DeviceLoad] = {}
        self._held_bytes = 0
        self._suspects = Suspects(self._loop.time)
        self._recheck: asyncio.TimerHandle | None = None
        self.inputs: dict[int, tuple[TensorInfo, ...]] = {}  # by entry
        self.outputs: dict[int, tuple[TensorInfo, ...]] = {}
        self.unmerged = ""
        self.num_batches = self.num_rows = 0  # sent to the first stage so far

    @property
    def reason(self) -> str:
        """Why no request can be computed now; empty if all stages are up."""
        return "; ".join(f"stage {one.number}: {one.reason}" for one in self._stages if not one.is_up)

    @property
    def pids(self) -> list[int]:
        """The processes of the stages."""
        return [stage.pid for stage in self._stages]

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the stages within the block; raises ConfigError if one cannot be loaded."""
        try:
            with unwrapped():
                async with asyncio.TaskGroup() as group:  # if a task fails, which is a bug, the block is cancelled
                    tasks = [group.create_task(stage.run(), name=f"stage-{stage.number}") for stage in self._stages]
                    tasks.append(group.create_task(self._trim(), name="trim-slots"))
                    try:
                        await self._load()
                        yield
                    finally:
                        for task in tasks:
                            task.cancel()
        finally:
            if self._recheck is not None:
                self._recheck.cancel()
            self._refuse_all("UNAVAILABLE", "the stage server is stopping; send the request to another one, or later")
            self._slots.close()

    async def _load(self) -> None:
        loads = [stage.first_load for stage in self._stages]
        await asyncio.wait(loads, return_when=asyncio.FIRST_EXCEPTION)
        faults = [one.exception() for one in loads if one.done()]
        if fault := next((one for one in faults if one is not None), None):
            for one in loads:
                one.cancel()
            raise ConfigError(f"model {self.name} cannot be served: {fault}") from fault
        self._connect([one.result() for one in loads])

    async def infer(self, device: str, tensors: Mapping[str, Array], timeout_s: float = math.inf) -> list[Output]:
        """Return the outputs; raises RequestRefused. Cancelling it takes the request out of the queue."""
        request = self.submit(device, tensors, timeout_s)
        return await request.settled

    def submit(
        self, device: str, tensors: Mapping[str, Array], timeout_s: float = math.inf, entry: int = 0
    ) -> StageRequest:
        """Queue a request whose tensors fit the model; raises RequestRefused if its device has too much waiting."""
        now_s = self._loop.time()
        limit_s = min(timeout_s, self._limits.request_s)
        if limit_s <= 0:
            raise RequestRefused("DEADLINE_EXCEEDED", "the request's time was over when it arrived")
        request = StageRequest(device, tensors, now_s, now_s + limit_s, entry)
        self._admit(request)
        request.divide(self._limits.rule.max_rows, merges=not self.unmerged)
        self._check_size(request)
        alone = self._suspects.are_alone(device)
        for part in request.parts:
            part.alone = part.alone or alone
        self._enter(request)
        for part in request.parts:
            self._queues[entry].put(part)
        self._feed()
        return request

    def _admit(self, request: StageRequest) -> None:
        limits, device = self._limits, request.device
        load = self._loads.get(device, _DeviceLoad())
        if reason := self._suspects.refusal(device):
            raise RequestRefused("RESOURCE_EXHAUSTED", reason)
        if load.requests >= limits.device_requests:
            raise RequestRefused(
                "RESOURCE_EXHAUSTED",
                f"device {device} has {load.requests} requests waiting here, the most that it may have; wait for one",
            )
        if load.num_bytes + request.num_bytes > limits.device_bytes and load.requests:
            raise RequestRefused(
                "RESOURCE_EXHAUSTED",
                f"the waiting requests of device {device} would have {load.num_bytes + request.num_bytes} bytes; "
                f"allowed: {limits.device_bytes}",
            )
        if self._held_bytes + request.num_bytes > limits.all_bytes:
            raise RequestRefused(
                "RESOURCE_EXHAUSTED",
                f"the requests that wait here have {self._held_bytes} bytes, of at most {limits.all_bytes}; try later",
            )

    def _check_size(self, request: StageRequest) -> None:
        largest = max(part.cost for part in request.parts)
        if largest * 2 > self._limits.slot_bytes:
            raise RequestRefused(
                "INVALID_ARGUMENT",
                f"the request needs {largest} bytes at a time; at most {self._limits.slot_bytes // 2} are computed "
                "here. Send fewer rows",
            )

    def _enter(self, request: StageRequest) -> None:
        load = self._loads.setdefault(request.device, _DeviceLoad())
        load.requests += 1
        load.num_bytes += request.num_bytes
        self._held_bytes += request.num_bytes
        words = f"the request took longer than {request.deadline_s - request.arrived_s:.3g} s"
        timer = self._loop.call_at(request.deadline_s, request.refuse, "DEADLINE_EXCEEDED", words)

        def leave(_: object) -> None:
            timer.cancel()
            load.requests -= 1
            load.num_bytes -= request.num_bytes
            self._held_bytes -= request.num_bytes
            if not load.requests and self._loads.get(request.device) is load:
                del self._loads[request.device]
            for part in request.parts:
                self._queues[request.entry].remove(part)

        request.settled.add_done_callback(leave)

    # From the queues to the stages.

    def _feed(self) -> None:
        """Send what is due to the stages, the last ones first."""
        for number in range(len(self._stages) - 1, -1, -1):
            while self._feed_stage(number):
                pass

    def _feed_stage(self, number: int) -> bool:
        """Send one batch to a stage: in turn one that an earlier stage computed, and one that begins here."""
        stage = self._stages[number]
        if not stage.is_up or stage.num_running >= DEPTH:
            return False
        sources = [self._feed_waiting, self._feed_new]
        for source in reversed(sources) if self._turns[number] else sources:
            if source(number):
                self._turns[number] = source == sources[0]
                return True
        return False

    def _feed_waiting(self, number: int) -> bool:
        waiting = self._waiting[number]
        while waiting:
            batch = waiting.popleft()
            if all(part.request.is_over for part in batch.parts):
                self._release(batch)
                continue
            self._send(batch)
            return True
        return False

    def _feed_new(self, number: int) -> bool:
        stage, queue = self._stages[number], self._queues.get(number)
        while queue and self._slots.num_free:
            parts = queue.take(self._loop.time(), is_idle=stage.num_running == 0)
            if not parts:
                if stage.num_running == 0:
                    self._look_again(queue.due_s)
                return False
            if left := [part for part in parts if not part.request.is_over]:
                self._begin(left, number)
                return True
        return False

    def _look_again(self, at_s: float) -> None:
        """Feed the stages at a time when a batch is due, if they are not fed before."""
        if self._recheck is not None:
            if self._loop.time() < self._recheck.when() < at_s:
                return
            self._recheck.cancel()
        self._recheck = self._loop.call_at(at_s, self._feed)

    def _begin(self, parts: list[Part], stage: int) -> None:
        begin, end = self._slots.take()
        free = begin
        tensors: dict[str, Placed] = {}
        for name in parts[0].tensors:
            tensors[name], free = self._slots.write([part.tensors[name] for part in parts], free, end)
        batch = _Batch(next(self._numbers), parts, begin, end, tensors, free, stage)
        self.num_batches += 1
        self.num_rows += sum(part.rows for part in parts)
        self._send(batch)

    def _send(self, batch: _Batch) -> None:
        stage = self._stages[batch.stage]
        facts = stage.facts
        names = [one.name for one in facts.inputs] if facts is not None else []
        self._batches[batch.number] = batch
        stage.send(batch.number, {name: batch.tensors[name] for name in names}, batch.free, batch.end)

    # What the stages say.

    def done(self, stage: StageProcess, batch: int, tensors: Mapping[str, Placed], free: int) -> None:
        one = self._batches.pop(batch)
        one.tensors.update(tensors)
        one.free = free
        if stage is self._stages[-1]:
            self._deliver(one)
        else:
            one.stage += 1
            self._waiting[one.stage].append(one)
        self._feed()

    def failed(self, stage: StageProcess, batch: int, error: str, *, memory: bool) -> None:
        one = self._batches.pop(batch)
        self._release(one)
        if len(one.parts) > 1:
            for part in one.parts:
                part.alone = True
                if not part.request.is_over:
                    self._queues[part.request.entry].put_back(part)
        else:
            status = "RESOURCE_EXHAUSTED" if memory else "INVALID_ARGUMENT"
            remedy = "the stage lacks memory for it; send fewer rows" if memory else "check the request's values"
            one.parts[0].request.refuse(status, f"stage {stage.number} cannot compute this request ({remedy}): {error}")
        self._feed()

    def changed(self, stage: StageProcess, lost: list[int], reason: str) -> None:
        for number in lost[:1]:  # the one that it computed; the next one waited
            self._suspects.note_death([part.request.device for part in self._batches[number].parts])
        for number in lost:
            one = self._batches.pop(number)
            self._release(one)
            for part in one.parts:
                part.request.refuse(
                    "UNAVAILABLE", f"stage {stage.number} was lost while it had this request: {reason}. Send it again"
                )
        self._feed()

    def _deliver(self, batch: _Batch) -> None:
        row = 0
        for part in batch.parts:
            if not part.request.is_over:
                part.request.take_result(
                    part, [self._output(batch, one.name, row, part) for one in self.outputs[part.request.entry]]
                )
            row += part.rows
        self._release(batch)

    def _output(self, batch: _Batch, name: str, row: int, part: Part) -> Output:
        """Return the rows of a part, copied from the slot."""
        placed = batch.tensors[name]
        shape, offset = placed.shape, placed.offset
        if len(batch.parts) > 1:
            row_bytes = dtype_of(placed.datatype).itemsize * math.prod(shape[1:])
            shape, offset = (part.rows, *shape[1:]), offset + row * row_bytes
        num_bytes = dtype_of(placed.datatype).itemsize * math.prod(shape)
        return name, placed.datatype, shape, self._slots.bytes_at(offset, num_bytes)

    def _release(self, batch: _Batch) -> None:
        self._slots.give_back(batch.begin, batch.free)

    # Begin and end.

    def _connect(self, facts: Sequence[StageFacts]) -> None:
        """Find what requests bring at each entry and what they get: what the stages from there on take, and make."""
        wanted = self._wanted or [info.name for info in facts[-1].outputs]
        for entry in self._queues:
            made = {info.name: info for one in facts[entry:] for info in one.outputs}
            self.inputs[entry] = _taken(facts[entry:])
            self.outputs[entry] = tuple(made[name] for name in wanted if name in made)
        whole = [one for some in self.inputs.values() for one in some if one.shape[:1] != (-1,)]
        reasons = [one.unmerged for one in facts if one.unmerged]
        self.unmerged = reasons[0] if reasons else f"{whole[0]} has a fixed first dimension" if whole else ""

    async def _trim(self) -> None:
        while True:
            await asyncio.sleep(TRIM_S)
            self._slots.trim()

    def _refuse_all(self, status: str, reason: str) -> None:
        for batch in (*self._batches.values(), *itertools.chain.from_iterable(self._waiting)):
            for part in batch.parts:
                part.request.refuse(status, reason)
        for queue in self._queues.values():
            while queue:
                for part in queue.take(math.inf, is_idle=True):
                    part.request.refuse(status, reason)


def _taken(facts: Sequence[StageFacts]) -> tuple[TensorInfo, ...]:
    """Return what stages take of which none is made by an earlier one of them."""
    made, taken = set[str](), dict[str, TensorInfo]()
    for one in facts:
        taken |= {info.name: info for info in one.inputs if info.name not in made}
        made |= {info.name for info in one.outputs}
    return tuple(taken.values())
