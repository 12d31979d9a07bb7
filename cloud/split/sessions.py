"""One job's training in the cloud: a session for each device, whose messages are handled one after the other.

A step is taken when the next message of its session shows that the device has taken it, too: until then it is
pending, so that a device that is lost in mid-step costs nothing but this step. After a lost connection both sides
continue from the latest step whose beginning both have.
`per-device`: each session has a part of its own, from the round's beginning. `shared`: all train the same part, with
gradients of each session's own, and steps are taken at once and never back: a device that repeats a step trains the
shared part with it again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloud.split.cache import CacheQuota, DeviceRows, rows_in
from cloud.split.records import SessionSpec
from cloud.split.results import SplitFolder, file_name, write_durably
from edgefl.config import TrainConfig
from edgefl.errors import ProtocolError
from edgefl.offload import wire
from edgefl.offload.training.checkpoints import PartCheckpoints
from edgefl.offload.training.crossing import packed, packed_gradients, unpacked
from edgefl.offload.training.halves import CloudForward, CloudHalf, MicroBatch
from edgefl.offload.training.layout import filled, with_rows
from edgefl.offload.training.model import PartedModel
from edgefl.offload.training.state import PartState
from edgefl.protocols.split.messages import (
    KEY_BYTES,
    ActivationRows,
    BeginTraining,
    Begun,
    FinishTraining,
    Forward,
    Frame,
    Gradients,
    Keep,
    Kept,
    Lacks,
    Message,
    Outputs,
    Returned,
    SampleStep,
    Stepped,
    Stored,
    TrainingFinished,
    Wanted,
    pack,
)
from edgefl.settings.split import SHARED
from edgefl.training.local import derive_seed
from edgefl.trees import SpooledTree
from edgefl.trees.tensors import tensor_of

if TYPE_CHECKING:
    import torch

WINDOW = 4

Answer = tuple[Message, Sequence[bytes]]
Gradient = Sequence["torch.Tensor | None"]


@dataclass(kw_only=True, eq=False)
class CloudJob:
    """What the sessions of a job have in common."""

    model: PartedModel
    folder: SplitFolder
    quota: CacheQuota
    window: int = WINDOW
    shared: PartState | None = None
    rows: dict[str, DeviceRows] = field(default_factory=dict)
    sessions: dict[str, CloudSession] = field(default_factory=dict)  # by device, the latest of each

    def session(self, spec: SessionSpec) -> CloudSession:
        """Return the device's session in this round: the one that it had, or a new one."""
        found = self.sessions.get(spec.device)
        if found is None or found.spec.round != spec.round:
            found = self.sessions[spec.device] = CloudSession(self, spec)
        return found

    def state(self, spec: SessionSpec) -> PartState:
        """Return the part from which a session begins."""
        if spec.train.split.cloud_part != SHARED:
            return self.model.of_rank(spec.rank).cloud_state(spec.inputs, SpooledTree(Path(spec.tensors)), spec.train)
        if self.shared is None:
            self.shared = self.model.cloud_state(spec.inputs, SpooledTree(Path(spec.tensors)), spec.train)
            if self.folder.shared.exists():
                self.shared.restore(SpooledTree(self.folder.shared))
        return self.shared

    def drop(self, device: str) -> None:
        """Forget a session that was refused; what it has kept on disk stays."""
        if (found := self.sessions.pop(device, None)) is not None:
            found.leave()

    def forget(self, before: int) -> None:
        """Forget what rounds before this one have left."""
        self.sessions = {device: one for device, one in self.sessions.items() if one.spec.round >= before}
        self.folder.forget_rounds(before)

    def rows_of(self, device: str) -> DeviceRows:
        """Return the device's cached activations; raises QuotaExceeded."""
        if device not in self.rows:
            self.folder.rows.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.rows[device] = DeviceRows(self.folder.rows / file_name(device), device, self.quota)
        return self.rows[device]


class CloudSession:
    """One device's training in one round."""

    def __init__(self, job: CloudJob, spec: SessionSpec) -> None:
        self._job, self.spec, self._model = job, spec, job.model.of_rank(spec.rank)
        self._seed = derive_seed(spec.train.seed, spec.round, spec.device)
        self._half = CloudHalf(job.model.task, job.state(spec), self._seed)
        self._step = 0  # the part's state is that before this step
        self._pending: float | None = None  # the loss of a step whose gradients are complete, but not taken
        self._gradients_so_far: Gradient = []  # of this session, while others use the shared part
        self._open: dict[int, CloudForward] = {}  # micro-batches whose gradients are missing
        self._done = 0  # micro-batches of the step
        self._of, self._loss = 0, 0.0
        self._keys: list[bytes] = []
        self._layouts = ("", "")
        self._checkpoints = PartCheckpoints(job.folder.kept / str(spec.round) / file_name(spec.device))
        self._handlers: Mapping[type[Any], Callable[[Frame, Any], Answer]] = {
            BeginTraining: self._begin, Forward: self._forward, Gradients: self._gradients, Keep: self._keep,
            FinishTraining: self._finish, Wanted: self._wanted, ActivationRows: self._rows,
            SampleStep: self._sample_step,
        }  # fmt: skip

    def handle(self, frame: Frame) -> bytes:
        """Return the answer to a device's message.

        Raises ProtocolError, TaskError or ConfigError for what cannot be used, QuotaExceeded for a full cache.
        """
        handler = self._handlers.get(type(frame.message))
        if handler is None:
            raise ProtocolError(f"a device sent {frame.message.kind!r}, which only the cloud sends")
        self._half.state.put_gradients(self._gradients_so_far)
        try:
            message, sections = handler(frame, frame.message)
        finally:
            self._gradients_so_far = self._half.state.take_gradients()
        return pack(message, *sections)

    def leave(self) -> None:
        """Give up the current step."""
        self._gradients_so_far, self._pending, self._open = [], None, {}

    @property
    def _config(self) -> TrainConfig:
        return self.spec.train

    def _begin(self, _frame: Frame, begin: BeginTraining) -> Answer:
        if begin.steps != self.spec.steps or begin.samples != self.spec.samples:
            raise ProtocolError(
                f"device {self.spec.device} begins with {begin.steps} steps on {begin.samples} samples; its round has "
                f"{self.spec.steps} on {self.spec.samples}"
            )
        self._open, self._done, self._of = {}, 0, 0
        step = self._common_step(set(begin.kept) | {0})
        return Begun(step=step, window=self._job.window), ()

    def _common_step(self, theirs: set[int]) -> int:
        """Go to the latest step whose beginning both sides have; return it."""
        if self._is_shared:
            self._drop()
            self._step = min(max(theirs), self.spec.steps)
            return self._step
        live = {self._step} | ({self._step + 1} if self._pending is not None else set())
        kept = set(self._checkpoints.steps())
        step = max(theirs & (live | kept | {0}))
        if step == self._step + 1 and self._pending is not None:
            self._take_pending()
        elif step == self._step:
            self._drop()
        else:
            self._pending = None
            self._half.state = self._job.state(self.spec)
            if step:
                self._half.state.restore(self._checkpoints.load(step))
            self._step = step
        return step

    def _drop(self) -> None:
        self._pending = None
        self._half.state.drop_gradients()

    def _take_pending(self) -> None:
        """Take the step whose gradients are complete."""
        import torch

        self._half.state.step(torch.tensor(self._pending))
        self._pending, self._step = None, self._step + 1

    def _forward(self, frame: Frame, one: Forward) -> Answer:
        self._refuse_cached()
        self._enter(one)
        values = unpacked(_section(frame, 0))
        parts = self._model.parts(one.inputs)
        self._refuse_other(values, parts.parts[1].needs)
        micro = MicroBatch(step=one.step, number=one.number, share=one.share)
        here = self._half.forward(parts, values, micro, differentiable=one.differentiable)
        if parts.has_last:
            self._open[one.number] = here
            return Outputs(step=one.step, number=one.number), [packed(self._half.crossing(here), self._wire)]
        targets = filled(one.targets, unpacked(_section(frame, 1), finite=False))
        loss = float(self._half.loss(here, targets))
        return self._returned(here, loss)

    def _enter(self, one: Forward) -> None:
        """Check that a micro-batch is the next one of its step."""
        if self._pending is not None and one.step == self._step + 1 and one.number == 0:
            self._take_pending()
        expected = self._done + len(self._open)
        if one.step != self._step or one.number != expected or self._pending is not None or (
            self._of and one.of != self._of
        ):  # fmt: skip
            raise ProtocolError(
                f"micro-batch {one.number} of step {one.step} is not expected: the next one is {expected} of step "
                f"{self._step}"
            )
        if one.step >= self.spec.steps or one.number >= one.of or len(self._open) >= self._job.window:
            raise ProtocolError(
                f"micro-batch {one.number} of {one.of} in step {one.step}: the training has {self.spec.steps} steps, "
                f"and {self._job.window} micro-batches may be in flight"
            )
        self._of = one.of

    def _gradients(self, frame: Frame, one: Gradients) -> Answer:
        here = self._open.pop(one.number, None)
        if here is None or one.step != self._step:
            raise ProtocolError(f"gradients of micro-batch {one.number} of step {one.step}, which is not in flight")
        gradients = unpacked(_section(frame, 0), scale=one.scale)
        for name, gradient in gradients.items():
            if name not in here.given or here.given[name].shape != gradient.shape:
                seen = list(here.given[name].shape) if name in here.given else "no such value"
                raise ProtocolError(f"gradient {name!r} has shape {list(gradient.shape)}; expected {seen}")
        self._half.backward(here, gradients)
        return self._returned(here, 0.0)

    def _returned(self, here: CloudForward, loss: float) -> Answer:
        """Return a micro-batch's gradients to the device; the last one completes its step."""
        self._done += 1
        self._loss += here.micro.share * loss
        gradients = self._half.gradients(here)
        data, scale = packed_gradients(gradients, self._wire)
        if self._done == self._of:
            self._pending, self._done, self._of, self._loss = self._loss, 0, 0, 0.0
            if self._is_shared:
                self._take_pending()
        return Returned(step=here.micro.step, number=here.micro.number, loss=loss, scale=scale), [data] if data else []

    @property
    def _is_shared(self) -> bool:
        return self._config.split.cloud_part == SHARED

    @property
    def _wire(self) -> str:
        return self._config.split.wire

    def _keep(self, _frame: Frame, one: Keep) -> Answer:
        self._settle(one.step)
        if self._is_shared:
            write_durably(self._half.state.snapshot(), self._made(self._job.folder.shared))
        else:
            self._checkpoints.keep(one.step, self._half.state.snapshot())
        return Kept(step=one.step), ()

    def _settle(self, step: int) -> None:
        if self._pending is not None:
            self._take_pending()
        if self._step != step or self._done or self._open:
            raise ProtocolError(
                f"device {self.spec.device} is before step {step}, and the cloud's part before {self._step}"
            )

    def _finish(self, _frame: Frame, _one: FinishTraining) -> Answer:
        self._settle(self.spec.steps)
        state, folder = self._half.state, self._job.folder
        if self._is_shared:
            write_durably(state.snapshot(), self._made(folder.shared))
        moved, adapters = state.moving(), self._model.adapters
        result = adapters.sent(moved, adapters.without_factors(moved))
        folder.write_result(self.spec.round, self.spec.device, result, self.spec.samples)
        return TrainingFinished(), ()

    @staticmethod
    def _made(path: Path) -> Path:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path

    # A frozen device part.

    def _wanted(self, frame: Frame, _one: Wanted) -> Answer:
        import numpy as np

        self._refuse_uncached()
        keys = wire.decode(_section(frame, 0)).get("keys")
        if keys is None or keys.dtype != np.uint8 or keys.shape != (self.spec.samples, KEY_BYTES):
            raise ProtocolError(f"the keys of samples are no uint8 ({self.spec.samples}, {KEY_BYTES})")
        self._keys = [one.tobytes() for one in keys]
        lacking = np.array(self._job.rows_of(self.spec.device).lacks(keys), "<i4")
        return Lacks(), [wire.encode({"positions": lacking}, "fp32")]

    def _rows(self, frame: Frame, one: ActivationRows) -> Answer:
        self._refuse_uncached()
        rows, positions = self._job.rows_of(self.spec.device), self._positions(frame)
        self._layouts = one.inputs, one.targets
        contents = list(rows_in(memoryview(_section(frame, 1))))
        if len(contents) != len(positions):
            raise ProtocolError(f"{len(contents)} rows for {len(positions)} positions")
        for at, content in zip(positions, contents, strict=True):
            rows.add(self._keys[at], content)
        write_durably_text(rows_layout(self._job, self.spec.device), "\n".join(self._layouts))
        return Stored(held_bytes=rows.held_bytes), ()

    def _sample_step(self, frame: Frame, one: SampleStep) -> Answer:
        import numpy as np
        import torch

        self._refuse_uncached()
        if self._pending is not None:
            self._take_pending()
        if one.step != self._step or one.step >= self.spec.steps:
            raise ProtocolError(f"step {one.step} is not expected; the next one is {self._step} of {self.spec.steps}")
        positions, rows = self._positions(frame), self._job.rows_of(self.spec.device)
        found = [rows.row(self._keys[at]) for at in positions]
        if not found:
            raise ProtocolError("a step has no samples")
        values, targets = (
            {name: tensor_of(np.concatenate([row[side][name] for row in found])) for name in found[0][side]}
            for side in (0, 1)
        )
        inputs, of_targets = self._known_layouts()
        parts = self._model.parts(with_rows(inputs, len(found)))
        self._refuse_other(values, parts.parts[1].needs)
        here = self._half.forward(parts, values, MicroBatch(step=one.step, number=0, share=1.0), differentiable=())
        loss = float(self._half.loss(here, filled(with_rows(of_targets, len(found)), targets)))
        self._half.state.step(torch.tensor(loss))
        self._step += 1
        return Stepped(step=one.step, loss=loss), ()

    def _known_layouts(self) -> tuple[str, str]:
        if not self._layouts[0]:
            inputs, _, targets = rows_layout(self._job, self.spec.device).read_text().partition("\n")
            self._layouts = inputs, targets
        return self._layouts

    def _positions(self, frame: Frame) -> list[int]:
        found = wire.decode(_section(frame, 0)).get("positions")
        if found is None or found.dtype.kind != "i" or found.ndim != 1 or not self._keys or (
            len(found) and not 0 <= int(found.min()) <= int(found.max()) < len(self._keys)
        ):  # fmt: skip
            raise ProtocolError(f"positions of samples are no integers from 0 to {len(self._keys) - 1}")
        return [int(one) for one in found]

    def _refuse_cached(self) -> None:
        if self._config.split.sends_once:
            raise ProtocolError("the device's part is frozen in this job: send `wanted` and `rows`, not `forward`")

    def _refuse_uncached(self) -> None:
        if not self._config.split.sends_once:
            raise ProtocolError("the device's part is trained in this job: send `forward`")

    @staticmethod
    def _refuse_other(values: Mapping[str, Any], needs: Sequence[str]) -> None:
        if set(values) != set(needs):
            raise ProtocolError(
                f"what crossed is {', '.join(sorted(values)) or 'nothing'}; the cloud's part reads "
                f"{', '.join(sorted(needs))}. The device has another model or cut"
            )


def rows_layout(job: CloudJob, device: str) -> Path:
    """Return the file of the layouts of a device's rows."""
    return job.folder.rows / f"{file_name(device)}.layout"


def write_durably_text(path: Path, text: str) -> None:
    """Write a small file completely, or not at all."""
    if not path.exists() or path.read_text() != text:
        part = path.with_suffix(".part")
        part.write_text(text)
        part.replace(path)


def _section(frame: Frame, at: int) -> bytes | memoryview:
    if len(frame.sections) <= at:
        raise ProtocolError(f"a message {frame.message.kind!r} has {len(frame.sections)} sections; expected {at + 1}")
    return frame.sections[at]
