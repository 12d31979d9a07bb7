"""How much of an input can be read from what crosses a cut: attacks on the operator's own samples.

Half of the samples train an attack, which gets what crosses and the inputs; on the other half it gets what crosses, and
its reconstruction is compared with the inputs. The strongest attack counts. An attacker with more samples, or with the
weights of the head, does better: a small number here proves nothing, a large one does.

    pictures (N, C, H, W)      a linear map, and a small decoder of convolutions      SSIM (Wang et al. 2004), 1 = equal
    tokens: integers (N, T)    the nearest embedding, linear maps and probes         the share of tokens that are right
    other numbers (N, ...)     a linear map                                           the share of variance explained

`blind` is what a guess without the tensors gets: the mean of the training half, or its most frequent token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgefl.errors import ConfigError
from edgefl.offload.graph import ModelGraph
from edgefl.trees import Array, Tree

MIN_SAMPLES = 16
SSIM, TOKENS, VARIANCE = "SSIM", "tokens", "variance"
_RIDGES = (1e-4, 1e-2, 1.0)  # relative to the mean square of the features
_WINDOW = 7  # pixels on a side, of SSIM
_STEPS, _BATCH, _WIDTH = 300, 32, 32  # of the decoder's training
_MAX_TOKENS = 4096  # that a probe tells apart
_ROWS = 1024  # compared with all embeddings at once


Attack = Callable[[Tree, Array, Tree], Sequence[Array]]  # seen and inputs of one half, seen of the other


@dataclass(frozen=True, kw_only=True, slots=True)
class Leak:
    """What the strongest attack on one cut read."""

    measure: str  # SSIM, TOKENS or VARIANCE
    value: float
    blind: float  # of a guess that sees nothing
    attack: str
    num_samples: int  # that it was trained on, and as many to judge it

    def as_json(self) -> dict[str, object]:
        return {
            "measure": self.measure, "value": self.value, "blind": self.blind, "attack": self.attack,
            "samples": self.num_samples,
        }  # fmt: skip


def leak_of(graph: ModelGraph, crossing: Tree, inputs: Tree, *, seed: int = 0) -> Leak:
    """Attack what crosses a cut; `crossing` and `inputs` have one row per sample.

    Of several inputs the one that leaks most is told. Raises ConfigError for fewer than `MIN_SAMPLES` samples.
    """
    count = min(len(one) for one in inputs.values())
    if count < MIN_SAMPLES:
        raise ConfigError(
            f"a leak is measured on at least {MIN_SAMPLES} samples, got {count}: give more with --samples"
        )
    given = {name: one for name, one in crossing.items() if one.ndim and len(one) == count}
    half = count // 2
    found = [_leak(graph, given, name, one, half, seed) for name, one in inputs.items()]
    return max(found, key=lambda one: one.value - one.blind)


def _leak(graph: ModelGraph, crossing: Tree, name: str, truth: Array, half: int, seed: int) -> Leak:
    attacks: Mapping[str, Attack]
    score: Callable[[Array, Array], float]
    if truth.dtype.kind in "iu" and truth.ndim == 2:
        measure, score, attacks = TOKENS, _tokens_right, _token_attacks(graph, name)
        blind = np.broadcast_to(_most_frequent(truth[:half]), truth[half:].shape)
    else:
        measure, score = (SSIM, ssim) if truth.ndim == 4 and min(truth.shape[2:]) >= _WINDOW else (VARIANCE, variance)
        attacks = {"linear map": linear_map} | ({"decoder": _decoder(seed)} if measure == SSIM else {})
        blind = np.broadcast_to(truth[:half].mean(0), truth[half:].shape)
    guess = Leak(
        measure=measure, value=score(truth[half:], blind), blind=score(truth[half:], blind), attack="guess",
        num_samples=half,
    )  # fmt: skip
    if name in crossing:
        return replace(guess, value=1.0, attack="it is sent")
    features = {one: array for one, array in crossing.items() if array.dtype.kind == "f"}
    seen, later = ({one: array[part] for one, array in features.items()} for part in (slice(half), slice(half, None)))
    found = [
        replace(guess, value=score(truth[half:], made), attack=attack)
        for attack, rebuild in (attacks.items() if features else ())
        for made in rebuild(seen, truth[:half], later)
    ]
    return max([guess, *found], key=lambda one: one.value)


def _flat(features: Tree) -> Array:
    found: Array = np.concatenate([one.reshape(len(one), -1) for one in features.values()], 1).astype(np.float64)
    return found


def linear_map(seen: Tree, truth: Array, later: Tree) -> list[Array]:
    """Return reconstructions by ridge regression, one for each strength; in the dual form, so samples set its cost."""
    features, others = _flat(seen), _flat(later)
    mean, target_mean = features.mean(0), truth.reshape(len(truth), -1).mean(0)
    features, others = features - mean, others - mean
    targets = truth.reshape(len(truth), -1) - target_mean
    gram, cross = features @ features.T, others @ features.T
    unit = max(float(np.trace(gram)) / len(gram), 1e-30)
    return [
        (cross @ np.linalg.solve(gram + ridge * unit * np.eye(len(gram)), targets) + target_mean).reshape(
            len(others), *truth.shape[1:]
        )
        for ridge in _RIDGES
    ]


def _decoder(seed: int) -> Attack:
    """Return an attack by a small network that is trained to invert the head; nothing without torch."""

    def attack(seen: Tree, truth: Array, later: Tree) -> list[Array]:
        try:
            import torch
        except ImportError:
            return []
        from edgefl.offload.decoder import train_decoder

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return [train_decoder(seen, truth, later, steps=_STEPS, batch=_BATCH, width=_WIDTH)]

    return attack


def _token_attacks(graph: ModelGraph, name: str) -> Mapping[str, Attack]:
    table = embedding_of(graph, name)
    attacks: dict[str, Attack] = {"linear probe": _probe}
    if table is not None:
        attacks["nearest embedding"] = lambda _seen, truth, later: [
            _nearest(table, one) for one in _states(later, truth.shape[1]) if one.shape[2] == table.shape[1]
        ]
        attacks["linear map to embeddings"] = lambda seen, truth, later: [
            _nearest(table, made)
            for states, others in zip(_states(seen, truth.shape[1]), _states(later, truth.shape[1]), strict=True)
            for made in _regressed(states, table[truth].reshape(truth.size, -1), others)
        ]
    return attacks


def embedding_of(graph: ModelGraph, name: str) -> Array | None:
    """Return the (V, D) table that an input's tokens are looked up in; None if there is none."""
    from onnx import numpy_helper

    weights = {one.name: one for one in graph.model.graph.initializer}
    for layer in graph.layers:
        read = layer.reads
        if layer.operator == "Gather" and read[1:2] == (name,) and read[0] in weights:
            table: Array = numpy_helper.to_array(weights[read[0]])
            if table.ndim == 2:
                return table
    return None


def _states(features: Tree, length: int) -> list[Array]:
    """Return the tensors with one vector for each token, (N, T, D)."""
    return [one for one in features.values() if one.ndim == 3 and one.shape[1] == length]


def _nearest(table: Array, states: Array) -> Array:
    """Return the token whose embedding has the smallest angle to each state."""
    rows = (table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)).T.astype(np.float32)
    flat = states.reshape(-1, states.shape[2]).astype(np.float32)
    parts = [(flat[at : at + _ROWS] @ rows).argmax(1) for at in range(0, len(flat), _ROWS)]
    return np.concatenate(parts).reshape(states.shape[:2])


def _probe(seen: Tree, truth: Array, later: Tree) -> list[Array]:
    """Return the tokens that a linear classifier (ridge regression to one-hot) reads from each position's state."""
    known = np.unique(truth)
    if len(known) > _MAX_TOKENS:
        return []
    right = (truth.reshape(-1, 1) == known).astype(np.float64)
    return [
        known[made.argmax(2)]
        for states, others in zip(_states(seen, truth.shape[1]), _states(later, truth.shape[1]), strict=True)
        for made in _regressed(states, right, others)
    ]


def _regressed(states: Array, targets: Array, others: Array) -> list[Array]:
    """Return what ridge regression from states (N, T, D) to targets (N * T, K) makes of others (M, T, D): (M, T, K)."""
    width, found = states.shape[2], []
    rows, later = (
        np.c_[one.reshape(-1, width), np.ones(one.size // width)].astype(np.float64) for one in (states, others)
    )
    square = rows.T @ rows
    for ridge in _RIDGES:
        unit = ridge * float(np.trace(square)) / len(square)
        weights = np.linalg.solve(square + unit * np.eye(len(square)), rows.T @ targets)
        found.append((later @ weights).reshape(*others.shape[:2], -1))
    return found


def _most_frequent(tokens: Array) -> Any:
    values, counts = np.unique(tokens, return_counts=True)
    return values[counts.argmax()]


def _tokens_right(truth: Array, made: Array) -> float:
    return float((truth == made).mean())


def variance(truth: Array, made: Array) -> float:
    """Return the share of the variance over samples that a reconstruction explains; 0 for the mean, 1 if exact."""
    total = float(np.square(truth - truth.mean(0)).sum())
    return max(0.0, 1 - float(np.square(truth - made).sum()) / total) if total else 0.0


def ssim(truth: Array, made: Array) -> float:
    """Return the mean structural similarity of pictures (N, C, H, W), with square windows of 7 pixels."""
    span = float(truth.max() - truth.min()) or 1.0
    one, other = truth.astype(np.float64), made.astype(np.float64)
    means, others = _windows(one), _windows(other)
    var_one, var_other = _windows(one * one) - means**2, _windows(other * other) - others**2
    both = _windows(one * other) - means * others
    small, large = (0.01 * span) ** 2, (0.03 * span) ** 2
    alike = (2 * means * others + small) * (2 * both + large)
    return float((alike / ((means**2 + others**2 + small) * (var_one + var_other + large))).mean())


def _windows(pictures: Array) -> Array:
    """Return the mean of each window."""
    sums = np.pad(pictures, ((0, 0), (0, 0), (1, 0), (1, 0))).cumsum(2).cumsum(3)
    size = _WINDOW
    found: Array = (
        sums[:, :, size:, size:] - sums[:, :, :-size, size:] - sums[:, :, size:, :-size] + sums[:, :, :-size, :-size]
    ) / size**2
    return found
