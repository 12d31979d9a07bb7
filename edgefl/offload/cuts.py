"""The cuts of an ONNX model, with the tensors that cross each, their bytes, and the weights on both sides.

Sizes are seen, not inferred: the model runs once on its sample, and returns each of its tensors. So models of any
shape can be listed, and the sizes are those of the sample's shape.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgefl.errors import ConfigError
from edgefl.models.session import new_session, run_errors
from edgefl.offload.graph import PREFIX, ModelGraph
from edgefl.trees import Tree, why_not_sent


@dataclass(frozen=True, slots=True)
class CrossingTensor:
    """A tensor that crosses a cut, at the sample's shape."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def as_json(self) -> dict[str, object]:
        return {"name": self.name, "type": self.dtype.name, "shape": list(self.shape), "bytes": self.num_bytes}

    def __str__(self) -> str:
        return f"{self.name} {self.dtype.name}{list(self.shape)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCut:
    """A cut that a model can be split at."""

    name: str  # split:NODE, by the head's last node
    num_head: int  # layers on the device
    operator: str  # of the head's last node
    tensors: tuple[CrossingTensor, ...]
    device_parameter_bytes: int
    cloud_parameter_bytes: int
    shared_parameter_bytes: int  # of weights that both sides have, such as tied ones; counted on each side
    sends_inputs: bool  # an input of the model crosses, or a tensor that is one in another form

    @property
    def num_bytes(self) -> int:
        """The bytes that cross, as they are."""
        return sum(one.num_bytes for one in self.tensors)

    @property
    def is_single(self) -> bool:
        """Whether one tensor alone crosses."""
        return len(self.tensors) == 1

    def as_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "device_layers": self.num_head,
            "operator": self.operator,
            "bytes": self.num_bytes,
            "single": self.is_single,
            "sends_inputs": self.sends_inputs,
            "device_parameter_bytes": self.device_parameter_bytes,
            "cloud_parameter_bytes": self.cloud_parameter_bytes,
            "shared_parameter_bytes": self.shared_parameter_bytes,
            "tensors": [one.as_json() for one in self.tensors],
        }


def all_tensors(graph: ModelGraph, feeds: Tree) -> dict[str, Any]:
    """Run a model; return its inputs, and what each layer writes: arrays, or lists where a value is a sequence.

    Raises ConfigError if the model does not run on these inputs.
    """
    names = [name for layer in graph.layers for name in layer.writes]
    with tempfile.TemporaryDirectory(prefix="edgefl-cuts-") as folder:
        path = Path(folder) / "all.onnx"
        save(with_outputs(graph, names), path, external=graph.has_external_data)
        try:
            found = new_session(path).run(names, dict(feeds))
        except run_errors() as cause:
            raise ConfigError(f"{graph.path.name} does not run on its sample: {cause}") from cause
    return {**feeds, **dict(zip(names, found, strict=True))}


def find_cuts(graph: ModelGraph, values: Mapping[str, Any]) -> list[ModelCut]:
    """Return the cuts of a model between its layers, in order; `values` are from `all_tensors`, of a batch of one.

    Where a value crosses that cannot be sent, such as a sequence or texts, there is no cut.
    """
    heads, tails = distinct_bytes(graph, graph.needs), distinct_bytes(graph, graph.needs[::-1])[::-1]
    found = []
    for at, layer in enumerate(graph.layers[:-1], start=1):
        crossing = graph.crossing(at)
        if not crossing or not all(_can_be_sent(values[name]) for name in crossing):
            continue
        device, cloud = heads[at - 1], tails[at]
        found.append(
            ModelCut(
                name=f"{PREFIX}{layer.name}",
                num_head=at,
                operator=layer.operator,
                tensors=tuple(CrossingTensor(name, values[name].dtype, values[name].shape) for name in crossing),
                device_parameter_bytes=device,
                cloud_parameter_bytes=cloud,
                shared_parameter_bytes=device + cloud - heads[-1],
                sends_inputs=bool(graph.input_copies & set(crossing)),
            )
        )
    return found


def with_outputs(graph: ModelGraph, names: Iterable[str]) -> Any:
    """Return the model with these tensors as its only outputs."""
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return model


def save(model: Any, path: Path, *, external: bool) -> None:
    """Write a model, with its weights in a file beside it if its source has them so."""
    import onnx

    if external:
        onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)
    else:
        onnx.save(model, path)


def distinct_bytes(graph: ModelGraph, needs: Sequence[frozenset[str]]) -> list[int]:
    """Return the bytes of the weights that the layers so far read, each counted once."""
    seen, totals, total = set[str](), [], 0
    for needed in needs:
        total += sum(graph.parameters[name] for name in needed - seen)
        seen |= needed
        totals.append(total)
    return totals


def _can_be_sent(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "fiub" and why_not_sent(value.dtype) is None
