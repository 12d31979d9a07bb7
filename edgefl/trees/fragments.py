"""Fragments of a model: whole tensors, of about equal bytes, of which one is exchanged in each round.

Streaming DiLoCo (Douillard et al. 2025, arXiv 2501.18512, Algorithm 2): round r sends the change of fragment
(r - 1) mod P; its new values come with round r + 1, so a device receives fragment (r - 2) mod P. In round 1, and where
it does not have the values of the round before, it receives the whole model.
The largest tensor goes first, each into the fragment with the fewest bytes so far (Graham 1969), which gives at most
4/3 of the best. So neighbouring layers are in different fragments, as the paper's strided pattern has them.
Invariant: the fragments depend on names, shapes and dtypes alone, so every device and the cloud find the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgefl.config import TrainConfig
from edgefl.errors import ConfigError
from edgefl.trees import TensorSpec, Tree, spec_of
from edgefl.trees.factors import is_low_rank
from edgefl.trees.views import renamed


def fragments_of(spec: Mapping[str, TensorSpec], count: int) -> tuple[tuple[str, ...], ...]:
    """Return the names of each fragment, in the order of the model.

    Raises ConfigError for fewer tensors than that, and for LoRA adapters, which begin anew in each round.
    """
    if count > max(1, len(spec)):  # a part of a model may have no tensors that change
        raise ConfigError(
            f"server.fragments={count}: the model has {len(spec)} tensors, and a fragment is one at least"
        )
    if count > 1 and any(map(is_low_rank, spec)):
        raise ConfigError(
            f"server.fragments={count}: the model has LoRA adapters, which begin anew in each round, so "
            "they cannot be exchanged in parts. Leave server.fragments out, or freeze the adapters' A"
        )
    loads, owner = [0] * count, dict[str, int]()
    for name in sorted(spec, key=lambda one: (-spec[one].num_bytes, one)):
        least = min(range(count), key=lambda index: (loads[index], index))
        owner[name] = least
        loads[least] += max(1, spec[name].num_bytes)
    return tuple(tuple(name for name in spec if owner[name] == index) for index in range(count))


def sent_fragment(train: TrainConfig) -> int:
    """Return the number of the fragment that is sent in a round, from 0."""
    return (train.round - 1) % train.fragments


def sent_part(parameters: Tree, train: TrainConfig) -> Tree:
    """Return the tensors of the whole model whose change a round's updates have."""
    return _fragment(parameters, train.fragments, sent_fragment(train))


def changed_part(parameters: Tree, train: TrainConfig) -> Tree:
    """Return the tensors that the round before has changed: what a device lacks that took part in it."""
    return _fragment(parameters, train.fragments, (train.round - 2) % train.fragments)


def _fragment(parameters: Tree, count: int, index: int) -> Tree:
    if count == 1:
        return parameters
    return renamed(parameters, {name: name for name in fragments_of(spec_of(parameters), count)[index]})
