"""The stages of a split ONNX model: files of their own, run one after the other, and compared with the whole.

A stage's inputs are the tensors that it reads and an earlier stage makes, and the inputs of the model that it reads;
its outputs are what a later stage reads of it, and the outputs of the model that it makes. Weights are only in the
stage that reads them; those that several read, such as tied ones, are in each.
`onnx.utils.Extractor` does most of this, but it does not see what subgraphs capture, and refuses sparse weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from edgefl.errors import ConfigError, ParityError
from edgefl.models.sample import allowed_difference, is_quantised
from edgefl.models.session import new_session, run_errors
from edgefl.models.tensors import described
from edgefl.offload.cuts import CrossingTensor, ModelCut, save
from edgefl.offload.graph import Layer, ModelGraph
from edgefl.trees import Array, Tree

HEAD, TAIL = "head.onnx", "tail.onnx"
# Relative to an output's largest value: the optimiser fuses other operators on both sides of a cut.
_RELATIVE: Mapping[str, float] = {"float16": 2e-3, "float32": 1e-5, "float64": 1e-9}

Transport = Callable[[Tree], Tree]  # what crosses -> what arrives


@dataclass(frozen=True, slots=True)
class StageFiles:
    """A model in two files."""

    head: Path
    tail: Path
    crossing: tuple[str, ...]
    sent_inputs: tuple[str, ...]  # inputs of the model among what crosses
    outputs: tuple[str, ...]  # of the whole model


def split_model(graph: ModelGraph, cut: ModelCut, folder: Path) -> StageFiles:
    """Write head.onnx and tail.onnx into a folder, with their weights beside them if the model has them so."""
    crossing = tuple(one.name for one in cut.tensors)
    head, tail = write_stages(graph, [0, cut.num_head, len(graph.layers)], folder, (HEAD, TAIL), cut.tensors)
    sent_inputs = tuple(name for name in crossing if name in graph.inputs)
    return StageFiles(head, tail, crossing, sent_inputs, graph.outputs)


def write_stages(
    graph: ModelGraph, positions: Sequence[int], folder: Path, names: Sequence[str] = (),
    seen: Sequence[CrossingTensor] = (),
) -> list[Path]:  # fmt: skip
    """Write the layers between consecutive positions, such as [0, 4, 9], as files; return them in their order.

    Files are called stage-1.onnx and so on, unless they get `names`. A tensor that the model's file does not declare
    is declared as it was `seen`, else as ONNX infers it; raises ConfigError if neither is known.
    """
    infos = _declared(graph, seen)
    paths = []
    for number, (first, last) in enumerate(pairwise(positions)):
        inputs, outputs = _ends(graph, first, last)
        if missing := [name for name in (*inputs, *outputs) if name not in infos]:
            infos |= _inferred(graph, missing)
        ends = [[infos[name] for name in side] for side in (inputs, outputs)]
        path = folder / (names[number] if names else f"stage-{number + 1}.onnx")
        save(_stage(graph, graph.layers[first:last], *ends), path, external=graph.has_external_data)
        paths.append(path)
    return paths


class SplitModel:
    """Both stages of a model, open in this process."""

    def __init__(self, files: StageFiles) -> None:
        self.files = files
        self._head, self._tail = _open(files.head), _open(files.tail)
        self._head_inputs = [one.name for one in self._head.get_inputs()]
        self._head_outputs = [one.name for one in self._head.get_outputs()]
        self._tail_outputs = [one.name for one in self._tail.get_outputs()]

    def head(self, feeds: Tree) -> tuple[Tree, Tree]:
        """Run the device's stage; return what crosses, and the outputs of the model that are known by then."""
        given = {name: feeds[name] for name in self._head_inputs}
        made = dict(zip(self._head_outputs, self._head.run(None, given), strict=True))
        crossing = {name: feeds[name] if name in self.files.sent_inputs else made[name] for name in self.files.crossing}
        return crossing, {name: made[name] for name in self.files.outputs if name in made}

    def tail(self, crossing: Tree) -> Tree:
        """Run the cloud's stage on what crossed; return the outputs of the model that it makes."""
        return dict(zip(self._tail_outputs, self._tail.run(None, dict(crossing)), strict=True))

    def run(self, feeds: Tree, transport: Transport | None = None) -> dict[str, Array]:
        """Run both stages; return the model's outputs by name, in its order."""
        crossing, outputs = self.head(feeds)
        found = {**outputs, **self.tail(crossing if transport is None else transport(crossing))}
        return {name: found[name] for name in self.files.outputs}


def check_parity(graph: ModelGraph, split: SplitModel, cases: Sequence[Tree], cut: ModelCut) -> float:
    """Return by how much the stages differ from the whole model, relative to its largest output.

    Raises ParityError if that is more than the arithmetic explains, or if a stage does not run.
    """
    session, worst = _open(graph.path), 0.0
    quantised = is_quantised(graph.path)
    infos = {one.name: one for one in described(graph.path.name, session.get_outputs())}
    for feeds in cases:
        try:
            whole = dict(zip(infos, map(np.asarray, session.run(None, dict(feeds))), strict=True))
            seen = split.run(feeds)
        except run_errors() as cause:
            raise ParityError(f"{graph.path.name}, {cut.name}: a stage does not run: {cause}") from cause
        for name, wanted in whole.items():
            allowed = allowed_difference(infos[name], [wanted], quantised=quantised)
            if not quantised and wanted.dtype.kind == "f":
                allowed = _RELATIVE[wanted.dtype.name] * max(1.0, _largest(wanted))
            difference = _difference(wanted, np.asarray(seen[name]))
            if not difference <= allowed:  # also if it is NaN
                raise ParityError(
                    f"{graph.path.name} split at {cut.name} does not compute what the whole model does: output "
                    f"{name!r} differs by {difference:.3g}, allowed: {allowed:.3g}. Choose another cut"
                )
            worst = max(worst, difference / max(1.0, _largest(wanted)) if wanted.dtype.kind == "f" else difference)
    return worst


def _difference(wanted: Array, seen: Array) -> float:
    """Return the largest difference of floats, or the fraction of other values that differ; infinite for a shape."""
    if wanted.shape != seen.shape or wanted.dtype != seen.dtype:
        return float("inf")
    if wanted.dtype.kind != "f":
        return float((wanted != seen).mean()) if wanted.size else 0.0
    with np.errstate(invalid="ignore"):
        same = (wanted == seen) | (np.isnan(wanted) & np.isnan(seen))  # infinities, and NaN where the whole has them
        return float(np.where(same, 0.0, np.abs(seen.astype(np.float64) - wanted)).max(initial=0.0))


def _largest(array: Array) -> float:
    finite = array[np.isfinite(array)]
    return float(np.abs(finite).max(initial=0.0))


def _open(path: Path) -> Any:
    try:
        return new_session(path)
    except run_errors() as cause:
        raise ConfigError(f"{path.name} is not a model that ONNX Runtime can open: {cause}") from cause


def _ends(graph: ModelGraph, first: int, last: int) -> tuple[list[str], list[str]]:
    """Return what the layers from `first` up to `last` take, and what they return."""
    layers = graph.layers[first:last]
    read = {name for layer in layers for name in layer.reads}
    made = {name for layer in layers for name in layer.writes}
    known = set(graph.head_outputs(first))
    if last == len(graph.layers):  # also those that are constants
        results = [name for name in graph.outputs if name not in known]
    else:
        results = [name for name in graph.head_outputs(last) if first == 0 or name not in known]
    inputs = [name for name in graph.made_by if name not in made and (name in read or (not first and name in results))]
    crossing = [name for name in graph.crossing(last) if name in made]
    return inputs, list(dict.fromkeys((*crossing, *results)))


def _declared(graph: ModelGraph, seen: Sequence[CrossingTensor]) -> dict[str, Any]:
    """Return how tensors are declared: as in the file, else with the type that was seen and free sizes."""
    from onnx import helper

    source = graph.model.graph
    known = {one.name: one for one in (*source.value_info, *source.input, *source.output) if _has_shape(one)}
    for one in seen:
        if one.name not in known:
            element = helper.np_dtype_to_tensor_dtype(one.dtype)
            known[one.name] = helper.make_tensor_value_info(one.name, element, [None] * len(one.shape))
    return known


def _inferred(graph: ModelGraph, names: Sequence[str]) -> dict[str, Any]:
    from onnx import shape_inference

    try:
        found = shape_inference.infer_shapes(graph.model).graph
    except shape_inference.InferenceError:  # an operator that ONNX does not know
        found = graph.model.graph
    except (ValueError, RuntimeError) as cause:
        raise ConfigError(f"{graph.path.name}: the shapes of its tensors cannot be inferred: {cause}") from cause
    known = {one.name: one for one in found.value_info if _has_shape(one)}
    known |= {one.name: one for one in found.output}  # which need no shape
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"the shape of tensor {unknown[0]!r} is not known; cut {graph.path.name} at another one")
    return {name: known[name] for name in names}


def _has_shape(info: Any) -> bool:
    return bool(info.type.tensor_type.HasField("shape"))


def _stage(graph: ModelGraph, layers: Sequence[Layer], inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
    """Return the model of some layers, with the constants and weights that they need."""
    from onnx import helper

    ends = {one.name for one in (*inputs, *outputs)}
    reads = [name for layer in layers for name in layer.reads]
    reads += [one.name for one in outputs if one.name in graph.constants or one.name in graph.parameters]
    weights = set(graph.weights_of(reads))
    source = graph.model.graph
    inside = {name for layer in layers for name in layer.writes} - ends
    stage = helper.make_graph(
        [*graph.constant_nodes(reads), *(layer.node for layer in layers)],
        source.name,
        inputs,
        outputs,
        [one for one in source.initializer if one.name in weights],
        value_info=[one for one in source.value_info if one.name in inside],
        sparse_initializer=[one for one in source.sparse_initializer if one.values.name in weights],
    )
    return helper.make_model(
        stage,
        ir_version=graph.model.ir_version,
        opset_imports=graph.model.opset_import,
        functions=graph.model.functions,
        producer_name=graph.model.producer_name,
    )
