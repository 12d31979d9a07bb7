"""Small ONNX graphs, whose cuts are known by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgefl.offload.cuts import ModelCut, all_tensors, find_cuts
from edgefl.offload.graph import ModelGraph, read_graph
from edgefl.trees import Tree

FLOAT = TensorProto.FLOAT


def value(name, sizes=("n", 4), kind=FLOAT):
    return helper.make_tensor_value_info(name, kind, list(sizes) if sizes is not None else None)


def weight(name, *shape, seed=0):
    return numpy_helper.from_array(np.random.default_rng(seed).normal(size=shape).astype(np.float32), name)


def write(path: Path, nodes, inputs, outputs, weights=(), **more) -> Path:
    """Write a model; lists of names are FLOAT[n, 4]."""
    ends = [[one if not isinstance(one, str) else value(one) for one in side] for side in (inputs, outputs)]
    external = more.pop("external", False)
    graph = helper.make_graph(nodes, "g", *ends, list(weights), **more)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if external:
        onnx.save(model, path, save_as_external_data=True, location="m.data", size_threshold=0)
    else:
        onnx.save(model, path)
    return path


def node(operator, reads, writes, **attributes):
    return helper.make_node(
        operator, reads.split(), writes.split(), name=f"{operator}_{writes.split()[0]}", **attributes
    )


def residual(path: Path, **more) -> Path:
    """h = relu(x @ a); y = (h + h @ b) @ a + x: a is tied, x is needed late, and a constant is computed of b."""
    return write(
        path,
        [
            node("MatMul", "x a", "xa"),
            node("Relu", "xa", "h"),
            node("Identity", "b", "same_b"),
            node("MatMul", "h same_b", "hb"),
            node("Add", "h hb", "sum"),
            node("Tanh", "h", "unused"),
            node("MatMul", "sum a", "last"),
            node("Add", "last x", "y"),
        ],
        ["x"],
        ["y"],
        [weight("a", 4, 4), weight("b", 4, 4, seed=1)],
        **more,
    )


def cuts_of(path: Path, feeds: Tree) -> tuple[ModelGraph, list[ModelCut]]:
    graph = read_graph(path)
    return graph, find_cuts(graph, all_tensors(graph, feeds))


def rows(num=1, seed=2):
    return np.random.default_rng(seed).normal(size=(num, 4)).astype(np.float32)
