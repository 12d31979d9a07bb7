"""A device's training in parts: micro-batches go up, their gradients come down, and both sides step together.

The schedule is 1F1B (Narayanan et al. 2019): up to a window of micro-batches are in flight, then each answer makes
place for the next, so that device, link and cloud work at the same time and the device's memory is bounded.
After a lost connection both sides continue from the latest step whose beginning both have: the current one, if only the
connection was lost, else a checkpoint. So the result is that of an undisturbed training, and a lost batch is repeated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from edge_agent.training.split.link import LinkLost, SplitLink
from edgefl.config import TrainConfig
from edgefl.errors import ProtocolError, TaskError
from edgefl.offload.training.auxiliary import AuxiliaryLoss
from edgefl.offload.training.checkpoints import PartCheckpoints
from edgefl.offload.training.crossing import packed, packed_gradients, packed_targets, unpacked
from edgefl.offload.training.halves import DeviceForward, DeviceHalf, MicroBatch
from edgefl.offload.training.layout import layout_of
from edgefl.offload.training.parts import ModelParts
from edgefl.offload.training.state import PartState
from edgefl.offload.training.traced import input_values
from edgefl.protocols.backoff import Backoff
from edgefl.protocols.split.messages import (
    BeginTraining,
    Begun,
    FinishTraining,
    Forward,
    Frame,
    Gradients,
    Keep,
    Kept,
    Outputs,
    Returned,
    TrainingFinished,
)
from edgefl.training.data.sample_set import SampleSet
from edgefl.training.structures import Structure, rows

if TYPE_CHECKING:
    import torch

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceRun:
    """What a device trains in a round."""

    half: DeviceHalf
    make_parts: Callable[[Structure], ModelParts]  # for inputs of this shape
    samples: SampleSet
    order: Sequence[torch.Tensor]  # positions of each step's samples
    config: TrainConfig
    seed: int
    begin: BeginTraining
    connect: Callable[[], SplitLink]  # raises LinkLost
    checkpoints: PartCheckpoints
    fresh: Callable[[], PartState]  # the state at the beginning of the round
    auxiliary: AuxiliaryLoss | None = None
    pause: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic


class DeviceLoop:
    """Runs a `DeviceRun` to its end."""

    def __init__(self, run: DeviceRun) -> None:
        self.run, self._step = run, 0  # the half's state is that before this step
        self._losses: dict[int, float] = {}
        self._counts = [len(one) for one in run.order]
        self.bytes_up = self.bytes_down = 0

    def train(self) -> float:
        """Take all steps; return the mean loss over all samples seen.

        Raises TaskError if the cloud refuses, or cannot be reached for `train.split.answer_s`.
        """
        pauses, patience_s = Backoff(FIRST_PAUSE_S, LONGEST_PAUSE_S), self.run.config.split.answer_s
        lost_at = self.run.clock()
        while True:
            before = self._step
            try:
                self._attempt()
            except LinkLost as lost:
                self.run.half.state.drop_gradients()
                if self._step != before:
                    lost_at = self.run.clock()
                    pauses.reset()
                if self.run.clock() - lost_at > patience_s:
                    raise TaskError(f"{lost}; given up after {patience_s:g} s without a step") from lost
                self.run.pause(pauses.next_s())
            else:
                self.run.checkpoints.forget()
                total = sum(count for step, count in enumerate(self._counts) if step in self._losses)
                return sum(self._losses[step] * self._counts[step] for step in self._losses) / max(1, total)

    def _attempt(self) -> None:
        link = self.run.connect()
        try:
            kept = sorted({0, *self.run.checkpoints.steps(), self._step})
            link.send(replace(self.run.begin, kept=kept))
            begun = expect(link.receive(), Begun)
            self._go_to(begun.step, kept)
            self._steps(link, begun.window)
            link.send(FinishTraining())
            expect(link.receive(), TrainingFinished)
        finally:
            self.bytes_up += getattr(link, "sent_bytes", 0)
            self.bytes_down += getattr(link, "received_bytes", 0)
            link.close()

    def _go_to(self, step: int, kept: Sequence[int]) -> None:
        """Continue from a step that both sides have."""
        if step == self._step:
            return
        if step not in kept:
            raise ProtocolError(f"the cloud begins with step {step}; this device has kept {list(kept)}")
        half = self.run.half
        half.state = self.run.fresh()
        if step:
            half.state.restore(self.run.checkpoints.load(step))
        self._step = step

    def _steps(self, link: SplitLink, window: int) -> None:
        """Take the steps that are left."""
        run, total = self.run, len(self.run.order)
        flight = _Flight(link, run, window)
        for batch in run.samples.batches(iter(run.order[self._step :]), run.seed):
            loss = flight.step(self._step, batch.inputs, batch.targets, len(batch))
            if loss is not None:
                self._losses[self._step] = loss
            self._step += 1
            if self._step % run.config.split.checkpoint_steps == 0 and self._step < total:
                flight.land()
                run.checkpoints.keep(self._step, run.half.state.snapshot())
                link.send(Keep(step=self._step))
                expect(link.receive(), Kept)
        flight.land()


class _Flight:
    """The micro-batches in flight on one connection."""

    def __init__(self, link: SplitLink, run: DeviceRun, window: int) -> None:
        self._link, self.run, self._window = link, run, window
        self._out: dict[tuple[int, int], DeviceForward] = {}
        self._targets: dict[tuple[int, int], Structure] = {}
        self._loss = 0.0

    def step(self, step: int, inputs: Structure, targets: Structure, num: int) -> float:
        """Take one step; return the batch's loss."""
        run, self._loss = self.run, 0.0
        micro_batches = list(micro_batches_of(step, num, run.config.split.micro_batches))
        for micro, at in micro_batches:
            while len(self._out) >= self._window:
                self._land_one()
            self._send(micro, len(micro_batches), rows(inputs, at), rows(targets, at))
        if run.auxiliary is None:
            self.land()
        import torch

        run.half.state.step(torch.tensor(self._loss))
        return self._loss

    def land(self) -> None:
        """Wait for all that is in flight."""
        while self._out:
            self._land_one()

    def _send(self, micro: MicroBatch, of: int, inputs: Structure, targets: Structure) -> None:
        run, split = self.run, self.run.config.split
        parts = run.make_parts(inputs)
        here = run.half.forward(parts, input_values(inputs), micro, trains=split.device_part == "trained")
        values, differentiable = run.half.crossing(here)
        if run.auxiliary is not None:
            self._loss += micro.share * run.auxiliary.learn(here, targets)
        message = Forward(
            step=micro.step, number=micro.number, of=of, share=micro.share, inputs=layout_of(inputs),
            targets="" if parts.has_last else layout_of(targets),
            differentiable=differentiable if run.auxiliary is None else (),
        )  # fmt: skip
        sections = [packed(values, split.wire)]
        if parts.has_last:
            self._targets[micro.step, micro.number] = targets
        else:
            sections.append(packed_targets(targets))
        self._out[micro.step, micro.number] = here
        self._link.send(message, *sections)

    def _land_one(self) -> None:
        """Handle the next answer."""
        run, frame = self.run, self._link.receive()
        message: Any = frame.message
        key = (message.step, message.number) if isinstance(message, Outputs | Returned) else None
        if key not in self._out:
            raise ProtocolError(f"the cloud answers with {frame.message}, which belongs to no micro-batch in flight")
        here = self._out[key]
        section = frame.sections[0] if frame.sections else b""
        if isinstance(message, Outputs):
            gradients = run.half.last(here, unpacked(section), self._targets.pop(key))
            data, scale = packed_gradients(gradients, run.config.split.wire)
            self._link.send(Gradients(step=message.step, number=message.number, scale=scale), data)
            return
        del self._out[key]
        if run.auxiliary is None:
            run.half.backward(here, unpacked(section, scale=message.scale))
            loss = message.loss if here.loss is None else float(here.loss)
            self._loss += here.micro.share * loss


def micro_batches_of(step: int, num: int, count: int) -> Iterator[tuple[MicroBatch, slice]]:
    """Yield the micro-batches of a batch of `num` samples, of equal size but for the last, and their positions."""
    size = -(-num // count)
    for number, start in enumerate(range(0, num, size)):
        end = min(start + size, num)
        yield MicroBatch(step=step, number=number, share=(end - start) / num), slice(start, end)


def expect(frame: Frame, kind: type[Any]) -> Any:
    """Return a frame's message; raises ProtocolError if it is of another kind."""
    if not isinstance(frame.message, kind):
        raise ProtocolError(f"the cloud answers with {frame.message.kind!r}; expected {kind.__name__.lower()!r}")
    return frame.message
