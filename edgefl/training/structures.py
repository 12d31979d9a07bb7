"""Structures of tensors: one tensor, or tuples, lists and dicts of structures, to any depth.

A task's inputs, targets and outputs are structures. They are torch's own pytrees (`torch.utils._pytree`), so that
`torch.func` and `torch.export` see the same leaves in the same order.
Invariant: `unnamed(named(structure, base), structure, base)` is the structure again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

from edgefl.errors import TaskError

if TYPE_CHECKING:
    import torch

Structure: TypeAlias = Any  # torch.Tensor, or a tuple, list or dict of structures

INPUT, TARGET, OUTPUT = "input", "target", "output"  # the names of a single tensor


def leaves(structure: Structure) -> list[Any]:
    """Return the leaves in order: tensors, and whatever else is no tuple, list or dict."""
    import torch

    return [structure] if isinstance(structure, torch.Tensor) else flattened(structure)[0]


def mapped(function: Callable[..., Any], structure: Structure, *others: Structure) -> Structure:
    """Return a structure of the same form: the function's results for its leaves.

    `others` have the same form; the function gets a leaf of each.
    """
    import torch

    if isinstance(structure, torch.Tensor):
        return function(structure, *others)
    from torch.utils import _pytree as pytree

    return pytree.tree_map(function, structure, *others, is_leaf=_is_leaf)


def named(structure: Structure, base: str, names: Sequence[str] = ()) -> dict[str, Any]:
    """Return the leaves by name, in the order of `leaves`: as ONNX files, signatures and serving name them.

    One tensor is `base`. A dict's parts have their keys, a named tuple's their fields; those of another tuple or list
    are `base_0`, `base_1`. `names`, if given, replaces the names of the first parts. Deeper names are joined by a
    point: `image.0`, `input_0.mask`. Raises TaskError for a key that is no string, and if two leaves would have one
    name.
    """
    found: dict[str, Any] = {}
    for name, leaf in _named(structure, base, names):
        if name in found:
            raise TaskError(f"two tensors of one structure would be named {name!r}; rename a key of the dict")
        found[name] = leaf
    return found


def unnamed(tensors: Mapping[str, Any], like: Structure, base: str, names: Sequence[str] = ()) -> Structure:
    """Return the structure of the form of `like` whose leaves are these: the inverse of `named`.

    The leaves may be of any type, such as arrays. Raises TaskError if one is missing.
    """
    wanted = list(named(like, base, names))
    if missing := [name for name in wanted if name not in tensors]:
        raise TaskError(f"{', '.join(missing)} is missing; there are {', '.join(tensors) or 'no tensors'}")
    return restored([tensors[name] for name in wanted], flattened(like)[1])


def call(model: torch.nn.Module, inputs: Structure) -> Structure:
    """Return the model's outputs for these inputs, passed as `arguments` says."""
    import torch

    if isinstance(inputs, torch.Tensor):
        return model(inputs)
    positional, by_keyword = arguments(model, inputs)
    return model(*positional, **by_keyword)


def arguments(model: torch.nn.Module, inputs: Structure) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the keyword arguments by which a model gets its inputs.

    A tuple or list is passed as positional arguments, and a dict as keyword arguments, if the signature of `forward`
    accepts as many, or such names; otherwise, and for one tensor, the inputs are the only argument.
    """
    if not _is_leaf(inputs):
        if isinstance(inputs, (tuple, list)) and _binds(_forward(model), len(inputs), ()):
            return tuple(inputs), {}
        if isinstance(inputs, dict) and _binds(_forward(model), 0, tuple(inputs)):
            return (), dict(inputs)
    return (inputs,), {}


def argument_names(model: torch.nn.Module, inputs: Structure) -> tuple[str, ...]:
    """Return the names of the parameters of `forward` that get the parts of a tuple; empty if it is not spread."""
    positional, by_keyword = arguments(model, inputs)
    if by_keyword or (len(positional) == 1 and positional[0] is inputs):
        return ()
    return _positional_names(_forward(model))[: len(positional)]


def described(structure: Structure, base: str) -> str:
    """Return the names, shapes and dtypes of the leaves for a message: `tokens int64 (4, 7), mask bool (4, 6)`."""
    return ", ".join(f"{name} {_seen(leaf)}" for name, leaf in _named(structure, base)) or f"{base} is empty"


def rows(structure: Structure, which: torch.Tensor | slice) -> Structure:
    """Return the structure of these rows of each tensor: an integer tensor of positions, or a slice."""
    return mapped(lambda one: one[which], structure)


def num_rows(leaf: Any) -> int:
    """Return a leaf's first dimension, which counts the samples; of a packed sequence, the number of sequences."""
    import torch

    if isinstance(leaf, torch.nn.utils.rnn.PackedSequence):
        return int(leaf.batch_sizes[0])
    return len(leaf)


def flattened(structure: Structure) -> tuple[list[Any], Any]:
    """Return the leaves, and the form: what structures have in common that differ in their leaves only; hashable."""
    from torch.utils import _pytree as pytree

    return pytree.tree_flatten(structure, is_leaf=_is_leaf)


def restored(tensors: Iterable[Any], form: Any) -> Structure:
    """Return the structure of this form with these leaves: the inverse of `flattened`."""
    from torch.utils import _pytree as pytree

    return pytree.tree_unflatten(tensors, form)


def _seen(leaf: Any) -> str:
    if not hasattr(leaf, "shape"):
        return type(leaf).__name__
    return f"{leaf.dtype} {tuple(leaf.shape)}".removeprefix("torch.")


def _is_leaf(value: Any) -> bool:
    """Whether a value is a leaf; also a packed sequence, which is a tuple of tensors only by its implementation."""
    import torch

    if isinstance(value, (torch.Tensor, torch.nn.utils.rnn.PackedSequence)):
        return True
    from torch.utils import _pytree as pytree

    return pytree._get_node_type(value) not in pytree.SUPPORTED_NODES  # noqa: SLF001 - tree_is_leaf is newer


def _named(structure: Structure, base: str, names: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    if _is_leaf(structure):
        yield base, structure
        return
    for n, (key, child) in enumerate(_parts(structure)):
        yield from _named_below(child, names[n] if n < len(names) else f"{base}_{key}" if isinstance(key, int) else key)


def _named_below(structure: Structure, name: str) -> Iterator[tuple[str, Any]]:
    if _is_leaf(structure):
        yield name, structure
        return
    for key, child in _parts(structure):
        yield from _named_below(child, f"{name}.{key}")


def _parts(structure: Structure) -> Iterator[tuple[str | int, Any]]:
    """Yield the parts in the order of `leaves`, with their key or field, or their number in a tuple or list."""
    from torch.utils import _pytree as pytree

    if isinstance(structure, dict):
        for key, child in structure.items():
            if not isinstance(key, str):
                raise TaskError(f"a dict of tensors has the key {key!r:.100}; expected a string")
            yield key, child
        return
    node = pytree.SUPPORTED_NODES[pytree._get_node_type(structure)]  # noqa: SLF001 - as above
    children, _ = node.flatten_fn(structure)
    yield from zip(getattr(structure, "_fields", range(len(children))), children, strict=True)


def _forward(model: torch.nn.Module) -> tuple[Callable[..., Any], bool]:
    """Return `model.forward` as the function that all models of its class have in common, and whether it has self."""
    forward = model.forward
    function = getattr(forward, "__func__", None)
    return (forward, False) if function is None else (function, True)


@lru_cache(maxsize=64)
def _parameters(forward: Callable[..., Any], has_self: bool) -> inspect.Signature | None:  # noqa: FBT001 - of _forward
    try:
        signature = inspect.signature(forward)
    except (ValueError, TypeError):  # some builtins, and scripted models, have no signature
        return None
    return signature.replace(parameters=list(signature.parameters.values())[has_self:])


@lru_cache(maxsize=64)
def _binds(forward: tuple[Callable[..., Any], bool], positional: int, keywords: tuple[str, ...]) -> bool:
    signature = _parameters(*forward)
    if signature is None:
        return False
    try:
        signature.bind(*[None] * positional, **dict.fromkeys(keywords))
    except TypeError:
        return False
    return True


@lru_cache(maxsize=64)
def _positional_names(forward: tuple[Callable[..., Any], bool]) -> tuple[str, ...]:
    signature = _parameters(*forward)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    known = {} if signature is None else signature.parameters
    return tuple(name for name, one in known.items() if one.kind in kinds)
