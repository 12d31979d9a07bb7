"""Cut an ONNX model at named tensors into consecutive stages, each a file of its own.

A border is the set of tensors that cross it. Weights stay with the nodes that use them.
Invariant: the stages, one after the other, are the nodes of the model, each in one stage, but for nodes that compute
constants. Each part is extracted by `onnx.utils.Extractor`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from edgefl.errors import ConfigError, MissingExtra

_INLINE_BYTES = 1 << 30  # a larger part has its weights in a file beside it


def stages_of(model: Path, borders: Sequence[Sequence[str]], folder: Path, begin: Sequence[str] = ()) -> list[Path]:
    """Write the stages between the borders as files in a folder, and return them in their order.

    `begin` are the tensors at which the first stage begins; by default the model's inputs. Raises ConfigError for a
    tensor that the model does not have, and for a border that a stage needs more than.
    """
    try:
        import onnx
        from onnx import shape_inference
        from onnx.utils import Extractor
    except ImportError as cause:
        raise MissingExtra("cutting a model into stages", "stages") from cause
    try:
        whole = shape_inference.infer_shapes(onnx.load(model))
    except (OSError, ValueError, RuntimeError, _decode_error()) as cause:
        raise ConfigError(f"{model} cannot be cut: it is not a model that ONNX can read: {cause}") from cause
    graph = _Graph(whole.graph)
    first = tuple(begin) or graph.inputs
    for name in (*first, *(name for border in borders for name in border)):
        graph.check_has(model, name)
    known = {one.name for one in (*whole.graph.value_info, *whole.graph.input, *whole.graph.output)}
    extractor, paths = Extractor(whole), []
    available, earlier = list(first), graph.nodes_before(first) if begin else set()
    for number, ends in enumerate((*borders, graph.outputs), 1):
        needed, inside = graph.between(ends, available, earlier, number)
        if unknown := [name for name in (*needed, *ends) if name not in known]:
            raise ConfigError(f"the shape of tensor {unknown[0]!r} is not known; cut {model.name} at another one")
        part = extractor.extract_model(list(needed), list(ends))
        path = folder / f"stage-{number}.onnx"
        is_large = part.ByteSize() > _INLINE_BYTES
        onnx.save(part, path, save_as_external_data=is_large, location=f"{path.name}.data" if is_large else None)
        paths.append(path)
        earlier |= inside
        available += [name for name in ends if name not in available]
    return paths


def _decode_error() -> type[Exception]:
    from google.protobuf.message import DecodeError

    return DecodeError


class _Graph:
    """Who produces which tensor."""

    def __init__(self, graph: Any) -> None:
        weights = {one.name for one in (*graph.initializer, *graph.sparse_initializer) if hasattr(one, "name")}
        self.inputs = tuple(one.name for one in graph.input if one.name not in weights)
        self.outputs = tuple(one.name for one in graph.output)
        self._nodes = list(graph.node)
        self._producer = {name: number for number, node in enumerate(self._nodes) for name in node.output if name}
        self._constant: set[int] = set()
        for number, node in enumerate(self._nodes):  # in topological order
            sources = [name for name in _inputs_of(node) if name not in weights]
            if all(self._producer.get(name) in self._constant for name in sources):
                self._constant.add(number)

    def check_has(self, model: Path, name: str) -> None:
        """Raise ConfigError unless the graph computes this tensor, or takes it."""
        if name not in self._producer and name not in self.inputs:
            near = [one for one in self._producer if name.lower() in one.lower()][:5] or list(self._producer)[-5:]
            raise ConfigError(f"{model.name} has no tensor {name!r}; it has, for example: {', '.join(near)}")

    def nodes_before(self, names: Iterable[str]) -> set[int]:
        """Return the nodes that the tensors depend on."""
        found: set[int] = set()
        open_names = list(names)
        while open_names:
            number = self._producer.get(open_names.pop())
            if number is not None and number not in found:
                found.add(number)
                open_names += _inputs_of(self._nodes[number])
        return found - self._constant

    def between(
        self, ends: Sequence[str], available: Sequence[str], earlier: set[int], stage: int
    ) -> tuple[list[str], set[int]]:
        """Return which available tensors a stage needs, and its nodes; raises ConfigError if it needs others."""
        needed: set[str] = set()
        inside: set[int] = set()
        missing: set[str] = set()
        open_names, met = list(ends), set(ends)
        while open_names:
            name = open_names.pop()
            number = self._producer.get(name)
            if name in available:
                needed.add(name)
            elif name in self.inputs or number in earlier:
                missing.add(name)
            elif number is not None:
                if number not in self._constant:
                    inside.add(number)
                open_names += [one for one in _inputs_of(self._nodes[number]) if one not in met]
                met.update(_inputs_of(self._nodes[number]))
        if missing:
            raise ConfigError(
                f"stage {stage} needs more than the tensors at its border: {', '.join(sorted(missing))}. Name them in "
                "the border, joined with +, or cut elsewhere"
            )
        if passed := [name for name in ends if name in available]:
            raise ConfigError(f"stage {stage} would only pass {passed[0]!r} on; leave out one of the borders")
        return [name for name in available if name in needed], inside


def _inputs_of(node: Any) -> list[str]:
    """Return the tensors that a node reads, also in its subgraphs."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            inner = {name for one in graph.node for name in one.output} | {one.name for one in graph.input}
            inner |= {one.name for one in graph.initializer}
            names += [name for one in graph.node for name in _inputs_of(one) if name not in inner]
            names += [one.name for one in graph.output if one.name not in inner]
    return names
