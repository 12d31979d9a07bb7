"""Guards: checks of an update before it may change any state, and of the parameters after a round's step.

Invariant: `admit` either returns, or raises UpdateRejected and has changed nothing.
A reason names the tensor and says what was seen and what was expected.
After the step, parameters that are not finite or wrapped around end the round, and the job keeps those from before:
guards admit finite updates of the right dtype, but their sum may exceed the range of the dtype. 3e38 + 3e38 is
infinity in float32, and an integer wraps around silently.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Container, Mapping, Sequence
from typing import Any

import numpy as np

from edgefl.errors import StepFailed, UpdateRejected
from edgefl.records import DeviceEvaluation, EvaluationSpec, Partial, Plan, Update
from edgefl.terminal.text import is_safe
from edgefl.trees import (
    BLOCK_ELEMENTS,
    Array,
    BlockTree,
    ComputedTree,
    Factors,
    TensorSpec,
    Tree,
    blocks,
    factors_of,
    is_float,
    parts,
    read_block,
    spec_of,
)
from edgefl.trees.fragments import sent_part
from edgefl.trees.views import joined, renamed

MAX_WEIGHT = 2.0**53  # far above any number of samples; products with it cannot overflow the float64 sums
MAX_METRIC = 1e200  # absolute value; its products with weights cannot overflow either
MAX_EVALUATED_VALUE = 1e100  # absolute value of an evaluated metric: it is squared, too
MAX_EVALUATED = 200  # metrics of one device
MAX_NAME_CHARS = 200

DEVICES = "devices/"  # begins the names of federated evaluation
COUNT, STD, WORST_TENTH = "count", "std", "worst_tenth"


class RoundGuard:
    """Admits each device of one plan once, with a finite update of the plan's shapes and dtypes.

    An update of the round before is admitted, too, once per device of those that are owed it.
    """

    def __init__(self, plan: Plan, *, any_device: bool = False) -> None:
        """Check updates for a plan; with `any_device`, the caller knows that they are of its cohort."""
        self._plan = plan
        self._spec = spec_of(sent_part(plan.parameters, plan.train))
        self._cohort = None if any_device else frozenset(plan.clients)
        self._admitted: set[str] = set()
        self._owed = set(plan.owed)

    def admit(self, update: Update) -> None:
        """Raise UpdateRejected with the first fault; otherwise record that the device was admitted."""
        fault = (
            self._wrong_origin(update)
            or wrong_weight(update.weight)
            or wrong_metrics(update.metrics)
            or wrong_spec(spec_of(update.tree), self._spec)
            or wrong_rank(update.tree)
            or not_finite(update)
        )
        if fault:
            raise UpdateRejected(update.device, fault)
        if is_late(update, self._plan):
            self._owed.remove(update.device)
        else:
            self._admitted.add(update.device)

    def admit_partial(self, partial: Partial) -> None:
        """Raise UpdateRejected with the first fault of a partial sum; otherwise record all its contributors."""
        wanted = partial_spec(self._spec, is_mean=partial.is_mean)
        fault = (
            self._wrong_contributors(partial.contributors)
            or wrong_weight(partial.weight)
            or wrong_metrics(
                {n: total / weight if weight > 0 else math.nan for n, (total, weight) in partial.metrics.items()}
            )
            or _wrong_evaluations(partial)
            or wrong_spec(spec_of(partial.total), wanted)
            or wrong_rank(partial.total)
            or not_finite_tree(partial.total)
        )
        if fault:
            raise UpdateRejected(", ".join(partial.contributors), f"partial sum: {fault}")
        self._admitted.update(partial.contributors)

    def _wrong_contributors(self, contributors: Sequence[str]) -> str | None:
        if not contributors:
            return "it names no contributors"
        if self._cohort is not None and (strangers := sorted(set(contributors) - self._cohort)):
            return f"{', '.join(strangers):.500} are not in the cohort of round {self._plan.round}"
        if len(set(contributors)) < len(contributors) or self._admitted & set(contributors):
            return f"a device is counted twice in round {self._plan.round}"
        return None

    def _wrong_origin(self, update: Update) -> str | None:
        plan = self._plan
        if is_late(update, plan):
            return None if update.device in self._owed else f"its round {update.round} is over"
        if (update.job, update.round) != (plan.job, plan.round):
            return f"it is for round {update.round} of job {update.job!r}; open is round {plan.round} of {plan.job!r}"
        if self._cohort is not None and update.device not in self._cohort:
            return f"the device is not in the cohort of round {plan.round}"
        if update.device in self._admitted:
            return f"the device was already admitted in round {plan.round}"
        return None


def is_late(update: Update, plan: Plan) -> bool:
    """Whether an update is of the round before, which may count in this one."""
    return bool(plan.owed) and (update.job, update.round) == (plan.job, plan.round - 1)


def wrong_weight(weight: float) -> str | None:
    """Say what is wrong with a weight, if anything is."""
    if not 0 < weight <= MAX_WEIGHT:  # NaN fails here too
        return f"weight {weight} must be finite, above 0 and at most {MAX_WEIGHT:.0f}"
    return None


def wrong_metrics(metrics: Mapping[str, float]) -> str | None:
    """Say which metric is not a finite number, if any."""
    for name, value in metrics.items():
        if not math.isfinite(value) or abs(value) > MAX_METRIC:
            return f"metric {name!r} is {value}, not a finite number of at most {MAX_METRIC:g}"
        if name.startswith(DEVICES):
            return f"metric {name!r} begins with {DEVICES}, as federated evaluation does; it is of the training"
    return None


def wrong_evaluation(evaluation: DeviceEvaluation, spec: EvaluationSpec) -> str | None:
    """Say why a device's evaluation cannot count, if it cannot; its update is not affected."""
    if evaluation.fault:
        return evaluation.fault
    metrics = evaluation.metrics
    if not 0 < len(metrics) <= MAX_EVALUATED:
        fault: str | None = f"it has {len(metrics)} metrics; expected at least one and at most {MAX_EVALUATED}"
    else:
        fault = (
            wrong_weight(evaluation.weight)
            or next((one for name in metrics if (one := _wrong_name(name, spec))), None)
            or wrong_evaluated(metrics)
            or same_name(metrics)
        )
    return None if fault is None else f"evaluation: {fault}"


def wrong_evaluated(metrics: Mapping[str, float]) -> str | None:
    """Say which evaluated metric is not a finite number, if any."""
    for name, value in metrics.items():
        if not abs(value) <= MAX_EVALUATED_VALUE:  # NaN fails here too
            return f"metric {name!r} is {value}, not a finite number of at most {MAX_EVALUATED_VALUE:g}"
    return None


def _wrong_name(name: str, spec: EvaluationSpec) -> str | None:
    if len(name) > MAX_NAME_CHARS or not is_safe(name):
        return (
            f"a metric's name is {name!r:.80}; expected at most {MAX_NAME_CHARS} characters, without control characters"
        )
    if spec.declared and base_of(name, spec.directions) is None:
        return f"metric {name!r} is not one of the task's: {', '.join(spec.directions)}"
    return None


def _wrong_evaluations(partial: Partial) -> str | None:
    """Say why the evaluations of a partial sum cannot be those of its contributors, if so."""
    found = partial.evaluations
    if found is None:
        return None
    if strangers := found.faults.keys() - set(partial.contributors):
        return f"evaluations: {min(strangers)} is not a contributor"
    if not 0 <= found.count <= len(partial.contributors) - len(found.faults):
        return f"evaluations: {found.count} devices and {len(found.faults)} faults of {len(partial.contributors)}"
    for name, (values, weights) in found.values.items():
        if not 0 < len(values) == len(weights) <= found.count:
            return f"evaluations: metric {name!r:.80} has {len(values)} values and {len(weights)} weights"
        faults = (
            wrong_weight(weight) or wrong_evaluated({name: value})
            for value, weight in zip(values, weights, strict=True)
        )
        if fault := next(filter(None, faults), None):
            return f"evaluations: {fault}"
    return None


def base_of(name: str, known: Container[str]) -> str | None:
    """Return the known metric that a name belongs to: `f1` for `f1/2`, one number of several; None = to none."""
    while name not in known:
        name, parted, _ = name.rpartition("/")
        if not parted:
            return None
    return name


def same_name(metrics: Collection[str]) -> str | None:
    """Say which two numbers of federated evaluation would get one name, if any."""
    for name in metrics:
        if name == COUNT:
            return f"a metric is named {COUNT!r}, but {DEVICES}{COUNT} is the number of devices; choose another name"
        for derived in (f"{name}/{STD}", f"{name}/{WORST_TENTH}"):
            if derived in metrics:
                return f"metrics {name!r} and {derived!r} would both be {DEVICES}{derived}; choose another name"
    return None


def wrong_spec(seen: Mapping[str, TensorSpec], wanted: Mapping[str, TensorSpec]) -> str | None:
    """Say how names, shapes or dtypes differ, if they do. Nothing broadcasts, nothing is cast."""
    if missing := sorted(wanted.keys() - seen.keys()):
        return f"tensors missing: {', '.join(missing):.500}"
    if unknown := sorted(seen.keys() - wanted.keys()):
        return f"tensors unknown: {', '.join(unknown):.500}"
    for name, spec in wanted.items():
        if seen[name] != spec:
            return f"tensor {name!r} is {seen[name]}, not {spec}"
    return None


def partial_spec(spec: Mapping[str, TensorSpec], *, is_mean: bool) -> dict[str, TensorSpec]:
    """Return the spec of a partial sum of updates: float64; a mean of floats of at most 32 bits is in float32."""
    wide, short = np.dtype(np.float64), np.dtype(np.float32)

    def dtype_of(one: TensorSpec) -> np.dtype[Any]:
        return short if is_mean and is_float(one.dtype) and one.dtype.itemsize <= short.itemsize else wide

    return {name: TensorSpec(one.shape, dtype_of(one)) for name, one in spec.items()}


def wrong_rank(tree: Tree) -> str | None:
    """Say which matrix has factors of a rank that no matrix of its shape has, if any: they would only cost memory."""
    for name in tree.factored if isinstance(tree, BlockTree) else ():
        pair = factors_of(tree, name)
        if pair is not None and pair.rank > min(pair.shape):
            rows, columns = pair.shape
            return (
                f"tensor {name!r} has factors of rank {pair.rank}; a matrix of {rows} x {columns} has at most rank "
                f"{min(pair.shape)}"
            )
    return None


def not_finite(update: Update) -> str | None:
    """Say which tensor of an update holds NaN or infinity, if any."""
    return not_finite_tree(update.tree)


def not_finite_tree(tree: Tree) -> str | None:
    """Say which tensor holds NaN or infinity, if any."""
    for name, spec in spec_of(tree).items():
        if (pair := factors_of(tree, name)) is not None:
            if fault := _unsound_factors(name, pair, spec.dtype):
                return fault
            continue
        if is_float(spec.dtype) and not all(_is_finite(part) for part in parts(tree, name)):
            return f"tensor {name!r} holds NaN or infinity"
    return None


def _unsound_factors(name: str, pair: Factors, dtype: np.dtype[Any]) -> str | None:
    """Say why a product is not finite in its dtype, if so."""
    if not all(np.isfinite(side.astype(np.float64)).all() for side in (pair.left, pair.right)):
        return f"tensor {name!r} holds NaN or infinity, in its factors"
    largest = [float(np.abs(side.astype(np.float64)).max(initial=0.0)) for side in (pair.left, pair.right)]
    limit = float(np.finfo(dtype).max)
    if largest[0] * largest[1] * pair.rank > limit and not np.abs(pair.product()).max(initial=0.0) <= limit:
        return f"tensor {name!r} is beyond the range of {dtype.name}: the product of its factors"
    return None


def _is_finite(flat: Array) -> bool:
    if flat.size <= BLOCK_ELEMENTS:
        return bool(np.isfinite(flat).all())
    return all(np.isfinite(flat[block]).all() for block in blocks(flat.size))


def integer_moves(mean: Tree) -> Tree:
    """Return the integer tensors of the mean, which the step does not overwrite."""
    names = {name: spec for name, spec in spec_of(mean).items() if spec.dtype.kind in "iu"}
    return ComputedTree(names, mean.read) if isinstance(mean, BlockTree) else {name: mean[name] for name in names}


def refuse_unsound(plan: Plan, moves: Tree, new: Tree, of_optimizer: str | None = None) -> Tree:
    """Return the new parameters; raise StepFailed for those, or an optimizer's state, out of their dtypes' range.

    `moves` come from `integer_moves`; `of_optimizer` is the fault that the optimizer reports, if any. New parameters
    that are read by blocks are checked when they are read: they are nobody's before all of them were.
    """

    def check(fault: str | None) -> None:
        if fault:
            raise StepFailed(
                f"round {plan.round} of job {plan.job}: after the step, {fault}. The job keeps the parameters from "
                "before this round. Use a smaller learning rate, or smaller updates, to stay within the range"
            )

    check(of_optimizer)
    if not (isinstance(new, BlockTree) and new.reads_blocks):
        check(not_finite_tree(new) or _wrapped(plan.parameters, moves, new))
        return new
    if new.factored:
        pairs, others = (
            renamed(new, {name: name for name in new if (name in new.factored) == factored})
            for factored in (True, False)
        )
        check(not_finite_tree(pairs))
        return joined(refuse_unsound(plan, moves, others), pairs) if others else new

    def checked(name: str, block: slice) -> Array:
        with np.errstate(over="ignore", invalid="ignore"):  # reported below, with the tensor's name
            part = new.read(name, block)
        check(not_finite_tree({name: part}))
        if name in moves:
            before, by = (read_block(tree, name, block) for tree in (plan.parameters, moves))
            check(_wrapped_part(name, before, by, part))
        return part

    return ComputedTree(new.spec, checked)


def _wrapped(old: Tree, moves: Tree, new: Tree) -> str | None:
    """Say which integer tensor left the range of its dtype, if any."""
    for name, move in moves.items():
        before, by, after = (tree.reshape(-1) for tree in (old[name], move, new[name]))
        for block in blocks(after.size):
            if fault := _wrapped_part(name, before[block], by[block], after[block]):
                return fault
    return None


def _wrapped_part(name: str, before: Array, by: Array, after: Array) -> str | None:
    left = _left_range(before, by, after)
    if not left.any():
        return None
    at = int(np.argmax(left))
    return f"tensor {name!r} is beyond the range of {after.dtype.name}: {before[at]} moved by {_signed(by)[at]}"


def _left_range(before: Array, by: Array, after: Array) -> Array:
    if after.dtype.kind == "u":
        return np.asarray(np.where(_signed(by) >= 0, after < before, after > before))
    return np.asarray(((before ^ after) & (by ^ after)) < 0)  # both differ in sign from the sum


def _signed(move: Array) -> Array:
    """Convert a wrapped difference of unsigned integers to the signed difference that it represents."""
    return move.view(move.dtype.str.replace("u", "i")) if move.dtype.kind == "u" else move
