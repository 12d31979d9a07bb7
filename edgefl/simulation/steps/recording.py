"""Record a training step once as a list of tensor operations, and run it many times.

Small models spend much of a step in autograd's bookkeeping and in Python; a recording has neither
(`torch.fx`). It runs the same kernels in the same order, including random ones. With a C++ compiler
the whole recording can be compiled (`torch.compile`'s Inductor), which also fuses the operations between
matrix products.
Invariant: a recording is used only after it gave the same result as autograd on the first batch of its shape;
a model that cannot be recorded, or whose recording differs, is trained by autograd as on a device.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from edgefl.config import TrainConfig
from edgefl.errors import TaskError
from edgefl.logs import event
from edgefl.simulation.steps.batch import Batch
from edgefl.simulation.steps.factored import FactoredGradients, OutputIndices, factor_gradients, unfactored
from edgefl.simulation.steps.simplify import simplify, specialize
from edgefl.task import MAX_QUOTED, Task, UserCode
from edgefl.training.quiet import quiet_tracing
from edgefl.training.randomness import Drawn
from edgefl.training.steps.descent import Autograd, Descent, loss_of
from edgefl.training.steps.layout import has_channels_last, laid_out
from edgefl.training.structures import Structure, arguments

if TYPE_CHECKING:
    import torch

MAX_RECORDINGS = 64  # shapes; autograd computes batches of further shapes
MAX_PARAMETERS = 1000  # tensors; recording takes milliseconds per tensor, too long for models with very many
RECORD_RAGGED_AT = 50  # steps of the same shapes before recording, if batches have many widths
RECORD_AT = 3  # steps of the same shapes in a stack before recording, which costs as much as tens of steps
TOLERANCE = 1e-3  # relative to the largest gradient: rounding is far below, a wrong computation far above

_log = logging.getLogger(__name__)

_Tensors = Sequence["torch.Tensor | None"]
_Function = Callable[..., tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Recording:
    """A recorded function from tensors to gradients and a loss."""

    run: _Function
    indices: OutputIndices

    def __call__(self, *tensors: torch.Tensor) -> FactoredGradients:
        import torch

        with torch.no_grad():
            return FactoredGradients(self.run(*tensors), self.indices)


class RecordedGradient:
    """Gradients of a batch's loss by a recorded step, or else by autograd. Buffers change as in a forward pass.

    The model's tensors must not move: change them only in place.
    """

    def __init__(self, task: Task, model: torch.nn.Module, *, compiled: bool = False) -> None:
        self._task, self._model, self._compiled = task, model, compiled
        self._by_autograd, self._channels_last = Autograd(task, model), has_channels_last(model)
        named = dict(model.named_parameters())
        self.trained = [one for one in named.values() if one.requires_grad]
        self._names = [name for name, one in named.items() if one.requires_grad]
        self._others = {n: one for n, one in named.items() if not one.requires_grad} | dict(model.named_buffers())
        self._state = [
            *(one.data for one in self.trained),
            *self._others.values(),
        ]  # changed in place
        self._recordings: dict[object, Recording | None] = {}
        self._widths: set[object] = set()  # the dimensions of batches, without the first
        self._seen: Counter[object] = Counter()  # batches without a recording
        self.why_not = ""  # why autograd is used, if it is
        if len(self.trained) > MAX_PARAMETERS:
            self.why_not = f"task {task.name!r}: its model has {len(self.trained)} parameters, too many to record"

    def __call__(self, inputs: Structure, targets: Structure) -> tuple[_Tensors, torch.Tensor]:
        """Return the gradients, None for a parameter that the loss does not depend on, and the loss, 0-d."""
        gradients = self.factored(inputs, targets)
        return gradients.materialized(), gradients.loss

    def factored(self, inputs: Structure, targets: Structure) -> FactoredGradients:
        """Return factored gradients, for callers that only apply them."""
        if self._channels_last:
            inputs = laid_out(inputs)
        batch = Batch.of(inputs, targets)
        recording = self._recording_of(batch)
        if recording is not None:
            return recording(*batch.tensors)
        gradients, loss = self._by_autograd(inputs, targets)
        return FactoredGradients((*gradients, loss), unfactored(len(gradients)))

    def _recording_of(self, batch: Batch) -> Recording | None:
        """Return the recording for batches of this kind, made now if it is worth it; None if there is none."""
        key = batch.key()
        if key in self._recordings:
            return self._recordings[key]
        if self.why_not or len(self._recordings) >= MAX_RECORDINGS or not self._is_worth_it(batch, key):
            return None
        recording = self._recordings[key] = self._record(batch)
        return recording

    def _is_worth_it(self, batch: Batch, key: object) -> bool:
        """Whether batches of this kind are likely to come again: sequences have many lengths."""
        self._widths.add(batch.width())
        self._seen[key] += 1
        return batch.is_tensors() and (len(self._widths) == 1 or self._seen[key] >= RECORD_RAGGED_AT)

    def _step(self, like: Batch, *tensors: Any) -> tuple[Any, ...]:
        """Compute the same as `_by_autograd`, as a function of all tensors that it uses."""
        import torch

        state = tensors[: len(self._state)]
        inputs, targets = like.structures(tensors[len(self._state) :])
        leaves = [one.detach().requires_grad_() for one in state[: len(self._names)]]
        named = dict(zip((*self._names, *self._others), (*leaves, *state[len(leaves) :]), strict=True))
        outputs = torch.func.functional_call(self._model, named, *arguments(self._model, inputs))
        loss = loss_of(self._task, outputs, targets)
        return (*torch.autograd.grad(loss, leaves, allow_unused=True), loss.detach())

    def _record(self, batch: Batch) -> Recording | None:
        """Record the step for batches of this shape; returns None and sets `why_not` if that is impossible."""
        before, drawn = _own_state(self._model), Drawn()
        arguments = [*self._state, *batch.tensors]
        try:
            with UserCode(self._task.name, "recording a step"):
                module, indices = record(partial(self._step, batch), arguments, len(self.trained))
        except TaskError as error:
            self.why_not = str(error)
            drawn.put_back()
            return None
        if drawn.since():
            drawn.put_back()  # restores the random state
            self.why_not = f"task {self._task.name!r}: its model or loss draws from Python's or numpy's random state"
            return None
        if _own_state(self._model) != before:
            self.why_not = f"task {self._task.name!r}: its model keeps state of its own besides parameters and buffers"
            return None
        for run in _runnable(self._task.name, module, arguments, self._state, compiled=self._compiled):
            recording = Recording(run, indices)
            self.why_not = self._fault_of(recording, batch)
            if not self.why_not:
                return recording
        return None

    def _fault_of(self, recording: Recording, batch: Batch) -> str:
        """Take one step with each from the same state, restore it, and return how they differ; empty if they agree."""
        import torch

        buffers, random = [one.clone() for one in self._others.values()], torch.get_rng_state()
        expected, loss = self._by_autograd(*batch.structures(batch.tensors))
        after = [one.clone() for one in self._others.values()]
        self._restore(buffers, random)
        try:
            seen = recording(*batch.tensors)
            gradients = seen.materialized()
        except (TypeError, RuntimeError) as error:
            return f"task {self._task.name!r}: a recorded step failed: {error}"
        moved = [one.clone() for one in self._others.values()]
        self._restore(buffers, random)
        agree = _agree(gradients, expected) and _agree([seen.loss, *moved], [loss, *after])
        return "" if agree else f"task {self._task.name!r}: a recorded step differs from autograd's"

    def _restore(self, buffers: Sequence[torch.Tensor], random: torch.Tensor) -> None:
        import torch

        torch.set_rng_state(random)
        with torch.no_grad():
            for one, value in zip(self._others.values(), buffers, strict=True):
                one.copy_(value)


class RecordedDescent(Descent):
    """Takes steps with recorded gradients; plain SGD applies factored ones without writing them to memory."""

    def __init__(self, task: Task, gradient: RecordedGradient) -> None:
        super().__init__(task, gradient)
        self._own_optimizer, self._recorded = task.optimizer is not None, gradient
        self._tensors = [one.data for one in gradient.trained]
        self._plain_lr: float | None = None

    def begin(self, config: TrainConfig) -> None:
        self._plain_lr = None if self._own_optimizer or config.proximal_mu else config.lr
        if self._plain_lr is None:
            super().begin(config)

    def take(self, inputs: Structure, targets: Structure) -> torch.Tensor:
        if self._plain_lr is None:
            return super().take(inputs, targets)
        gradients = self._recorded.factored(inputs, targets)
        gradients.apply(self._tensors, self._plain_lr)
        return gradients.loss


class RecordedFunction:
    """A pure function from parameters and a batch to their gradients and losses, recorded for frequent shapes."""

    def __init__(self, task: str, function: _Function, num_parameters: int, *, compiled: bool = False) -> None:
        self._task, self._function, self._number, self._compiled = task, function, num_parameters, compiled
        self._seen: Counter[tuple[object, ...]] = Counter()
        self._recordings: dict[tuple[object, ...], Recording] = {}

    def __call__(self, *tensors: torch.Tensor) -> FactoredGradients:
        key = tuple((one.shape, one.dtype) for one in tensors)
        recording = self._recordings.get(key)
        if recording is not None:
            return recording(*tensors)
        result = FactoredGradients(self._function(*tensors), unfactored(self._number))
        self._seen[key] += 1
        few = len(self._recordings) < MAX_RECORDINGS and self._number <= MAX_PARAMETERS
        if self._seen[key] == RECORD_AT and few:
            self._record(key, tensors, result)
        return result

    def _record(self, key: tuple[object, ...], tensors: Sequence[torch.Tensor], expected: FactoredGradients) -> None:
        try:
            with UserCode(self._task, "recording a step"):
                module, indices = record(self._function, tensors, self._number)
        except TaskError:
            return  # continue without a recording
        for run in _runnable(self._task, module, tensors, (), compiled=self._compiled):
            recording = Recording(run, indices)
            with UserCode(self._task, "a recorded step"):
                seen = recording(*tensors)
                agrees = _agree([*seen.materialized(), seen.loss], expected.outputs)
            if agrees:
                self._recordings[key] = recording
                return


def _runnable(
    task: str, module: torch.fx.GraphModule, arguments: Sequence[torch.Tensor], constants: Sequence[torch.Tensor],
    *, compiled: bool,
) -> Iterator[_Function]:  # fmt: skip
    """Yield functions that run a recording on the non-constant arguments, the fastest first."""
    if compiled and (made := _compiled(task, module, arguments)) is not None:
        yield partial(made, *constants)
    yield specialize(module, constants)
    yield partial(module.forward, *constants)


def record(
    step: _Function, arguments: Sequence[torch.Tensor], parameters: int
) -> tuple[torch.fx.GraphModule, OutputIndices]:
    """Return a step's graph of operations for tensors of these shapes, and the indices of gradients in its outputs.

    The first `parameters` arguments are parameters, whose gradients the step returns first. It is traced with
    tensors without values, so a step that branches on a value cannot be recorded: torch raises.
    """
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.graph import CodeGen

    with quiet_tracing():
        module = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(*arguments)
    simplify(module.graph)
    module.graph.set_codegen(CodeGen())  # plain arguments, no nested structures
    indices = factor_gradients(module.graph, parameters)
    module.recompile()
    return module, indices


def has_compiler() -> bool:
    """Whether there is a C++ compiler for Inductor."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None or shutil.which("clang++") is not None


def _compiled(task: str, module: torch.fx.GraphModule, arguments: Sequence[torch.Tensor]) -> _Function | None:
    """Compile a recording; returns None and logs a line if the compiler fails.

    Random operations are not compiled, so that their numbers are the same as on a device.
    """
    import torch
    import torch._inductor

    try:
        with torch._inductor.config.patch(fallback_random=True, size_asserts=False):  # noqa: SLF001 - as above
            return cast("_Function", torch._inductor.compile(module, list(arguments)))  # noqa: SLF001 - as above
    except (RuntimeError, OSError) as error:
        event(_log, logging.WARNING, "step.not_compiled", task=task, reason=str(error)[:MAX_QUOTED])
        return None


def _own_state(model: torch.nn.Module) -> list[tuple[str, str, object]]:
    """Return the plain attributes of modules, such as counters."""
    plain = (bool, int, float, str)
    return [
        (name, key, value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, plain)
    ]


def _agree(some: _Tensors, others: _Tensors) -> bool:
    """Whether tensors are equal up to rounding, relative to the largest number in them.

    Integers and booleans, such as counters and masks, must be equal.
    """
    scale = max((_largest(one) for one in others if one is not None and one.is_floating_point()), default=0.0)
    return all(_close(one, other, TOLERANCE * scale) for one, other in zip(some, others, strict=True))


def _largest(one: torch.Tensor) -> float:
    return float(one.abs().nan_to_num(0.0, 0.0).max()) if one.numel() else 0.0


def _close(one: torch.Tensor | None, other: torch.Tensor | None, within: float) -> bool:
    import torch

    if one is None or other is None:
        return one is other
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    if one.numel() and float((one - other).abs().max()) <= within:  # False for NaN
        return True
    return bool(torch.allclose(one.double(), other.double(), rtol=0, atol=within, equal_nan=True))
