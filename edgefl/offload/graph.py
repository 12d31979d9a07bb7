"""An ONNX model as a sequence of layers, and the cuts between them.

A *cut* divides the layers, in the file's order (which ONNX demands to be topological), into a head for the device and
a tail for the cloud. Each prefix of the layers is a head, so a model of N layers has N - 1 cuts inside. What crosses a
cut are the tensors that the tail reads and the head makes, and the model's inputs that the tail reads.
Layers are the nodes that depend on an input. Nodes that do not (constants, and what is computed of weights alone)
belong to no side: each stage has those that it reads, so that they never cross. Nodes of which no output depends are
left out. Subgraphs of If, Loop and Scan may capture any tensor of the graph around them; these count as inputs.
Invariant: every layer reads only constants, inputs of the model and outputs of earlier layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from edgefl.errors import ConfigError, MissingExtra

# These give other values in each run: without inputs they are no constants, and must run once.
_RANDOM = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli"}
# What only gives a tensor another form: its values are the input's.
_FORM_ONLY = {"Cast", "Flatten", "Identity", "Pad", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
PREFIX = "split:"  # begins the name of a cut


@dataclass(frozen=True, slots=True)
class Layer:
    """A node that depends on an input of the model."""

    name: str  # of the node; of its first output if it has none of its own
    operator: str  # such as Conv
    reads: tuple[str, ...]  # tensors, with those that its subgraphs capture
    writes: tuple[str, ...]
    node: Any = field(repr=False, compare=False)  # NodeProto


@dataclass(frozen=True, eq=False)
class ModelGraph:
    """A model that was read with `read_graph`."""

    path: Path
    model: Any = field(repr=False)  # ModelProto, with its external data
    layers: tuple[Layer, ...]
    constants: Mapping[str, Any]  # tensor -> the node that computes it of weights alone
    parameters: Mapping[str, int]  # weight -> its bytes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    has_external_data: bool

    @cached_property
    def last_use(self) -> Mapping[str, int]:
        """Tensor -> the number of the last layer that reads it; outputs of the model are not read by being outputs."""
        return {name: at for at, layer in enumerate(self.layers) for name in layer.reads}

    @cached_property
    def needs(self) -> tuple[frozenset[str], ...]:
        """The weights that each layer reads, directly or through constants."""
        return tuple(frozenset(self.weights_of(layer.reads)) for layer in self.layers)

    @cached_property
    def made_by(self) -> Mapping[str, int]:
        """Tensor -> the number of the layer that writes it; -1 for an input of the model."""
        made = {name: at for at, layer in enumerate(self.layers) for name in layer.writes}
        return dict.fromkeys(self.inputs, -1) | made

    @cached_property
    def input_copies(self) -> frozenset[str]:
        """The inputs, and the tensors that have only another form than an input: who sees these sees the input."""
        found = set(self.inputs)
        for layer in self.layers:
            if layer.operator in _FORM_ONLY and set(layer.reads[:1]) <= found:
                found.update(layer.writes)
        return frozenset(found)

    def crossing(self, num_head: int) -> tuple[str, ...]:
        """Return the tensors that cross the cut after so many layers, in the order in which they come to be."""
        last = self.last_use
        return tuple(name for name, at in self.made_by.items() if at < num_head <= last.get(name, -1))

    def head_outputs(self, num_head: int) -> tuple[str, ...]:
        """Return the outputs of the model that the first layers make."""
        return tuple(name for name in self.outputs if -1 <= self.made_by.get(name, num_head) < num_head)

    def position_of(self, name: str) -> int:
        """Return how many layers the head of a cut has, by the name of its last node or of a tensor of it.

        Raises ConfigError for an unknown name, and for the last layer, behind which nothing is left.
        """
        wanted = name.removeprefix(PREFIX)
        found = [at for at, layer in enumerate(self.layers) if wanted == layer.name or wanted in layer.writes]
        if not found:
            raise ConfigError(
                f"{self.path.name} has no cut {name!r}: no node or tensor of this name depends on an input. List its "
                "cuts with `edgefl offload cuts`"
            )
        if found[0] == len(self.layers) - 1:
            raise ConfigError(
                f"{self.path.name}: behind {name!r} no layer is left for the cloud; choose an earlier cut"
            )
        return found[0] + 1

    def constant_nodes(self, reads: Iterable[str]) -> list[Any]:
        """Return the nodes that compute these constants of weights, in the file's order."""
        wanted = set(self._closure(reads))
        return [node for node in self.model.graph.node if wanted & set(node.output) & self.constants.keys()]

    def weights_of(self, reads: Iterable[str]) -> Iterator[str]:
        """Yield the weights among tensors, and those of which constants among them are computed."""
        return (name for name in self._closure(reads) if name in self.parameters)

    def _closure(self, reads: Iterable[str]) -> Iterator[str]:
        left, seen = list(reads), set()
        while left:
            name = left.pop()
            if name in seen:
                continue
            seen.add(name)
            yield name
            if (node := self.constants.get(name)) is not None:
                left += tensors_read(node)


def read_graph(path: Path) -> ModelGraph:
    """Read a model; raises ConfigError if the file is none, or cannot be split. Its external data are read, too."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
        from onnx.external_data_helper import _get_all_tensors, uses_external_data
    except ImportError as cause:
        raise MissingExtra("splitting a model", "train") from cause
    try:
        model = onnx.load(path, load_external_data=False)
        external = any(uses_external_data(tensor) for tensor in _get_all_tensors(model))
        if external:
            onnx.external_data_helper.load_external_data_for_model(model, str(path.parent))
    except OSError as cause:
        raise ConfigError(f"cannot read {path}: {cause.strerror or cause}") from cause
    except (DecodeError, ValueError, onnx.checker.ValidationError) as cause:
        raise ConfigError(f"{path} is not an ONNX model with all its tensors: {cause}") from cause
    return _analysed(path, model, has_external_data=external)


def tensors_read(node: Any) -> list[str]:
    """Return the tensors that a node reads, with those that its subgraphs capture from around them."""
    found = [name for name in node.input if name]
    for graph in _subgraphs(node):
        found += [name for name in _captured(graph) if name not in found]
    return found


def _subgraphs(node: Any) -> list[Any]:
    return [
        graph
        for attribute in node.attribute
        for graph in ([attribute.g] if attribute.HasField("g") else list(attribute.graphs))
    ]


def _captured(graph: Any) -> list[str]:
    """Return the tensors that a subgraph reads and does not have, in the order of their use."""
    known = {one.name for one in (*graph.input, *graph.initializer)} | {one.values.name for one in _sparse(graph)}
    read: dict[str, None] = {}
    for node in graph.node:
        read |= {name: None for name in tensors_read(node) if name not in known}
        known |= set(node.output)
    return [*read, *(one.name for one in graph.output if one.name not in known and one.name not in read)]


def _sparse(graph: Any) -> Sequence[Any]:
    found: Sequence[Any] = graph.sparse_initializer
    return found


def _analysed(path: Path, model: Any, *, has_external_data: bool) -> ModelGraph:
    graph = model.graph
    parameters = {one.name: tensor_bytes(one) for one in graph.initializer}
    parameters |= {one.values.name: tensor_bytes(one.values) + tensor_bytes(one.indices) for one in _sparse(graph)}
    inputs = tuple(one.name for one in graph.input if one.name not in parameters)
    constants: dict[str, Any] = {}
    known, layers = {*parameters, *inputs}, []
    for node in graph.node:
        reads = tensors_read(node)
        if missing := [name for name in reads if name not in known]:
            raise ConfigError(
                f"{path.name}: node {_name(node)!r} reads {missing[0]!r} before any node makes it; ONNX demands nodes "
                "in topological order. Export the model again, or sort it with onnxruntime's tools"
            )
        writes = tuple(name for name in node.output if name)
        known.update(writes)
        if node.op_type not in _RANDOM and all(name in parameters or name in constants for name in reads):
            constants |= dict.fromkeys(writes, node)
        else:
            layers.append(Layer(_name(node), node.op_type, tuple(reads), writes, node))
    outputs = tuple(one.name for one in graph.output)
    return ModelGraph(
        path=path, model=model, layers=_needed(layers, outputs), constants=constants, parameters=parameters,
        inputs=inputs, outputs=outputs, has_external_data=has_external_data,
    )  # fmt: skip


def _needed(layers: Sequence[Layer], outputs: Iterable[str]) -> tuple[Layer, ...]:
    """Leave out the layers on which no output depends; give layers of one name the names of their tensors."""
    wanted, kept = set(outputs), []
    for layer in reversed(layers):
        if wanted & set(layer.writes):
            wanted |= set(layer.reads)
            kept.append(layer)
    names = Counter(layer.name for layer in kept)
    return tuple(
        layer
        if names[layer.name] == 1
        else Layer(layer.writes[0], layer.operator, layer.reads, layer.writes, layer.node)
        for layer in reversed(kept)
    )


def _name(node: Any) -> str:
    return str(node.name or next(iter(name for name in node.output if name), node.op_type))


def tensor_bytes(tensor: Any) -> int:
    """Return the bytes of a TensorProto's elements; types of less than a byte are packed."""
    from onnx import TensorProto, helper

    num = int(np.prod(tensor.dims, dtype=np.int64))
    if tensor.data_type == TensorProto.STRING:
        return sum(map(len, tensor.string_data))
    if tensor.data_type in {TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1}:
        return (num + 1) // 2
    return num * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
