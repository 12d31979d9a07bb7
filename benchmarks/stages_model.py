"""The model of `benchmarks.stages`: equal layers of MatMul and Relu, whole and as head and tail."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.utils import Extractor


def write_model(folder: Path, width: int, head_layers: int, tail_layers: int) -> str:
    """Write model.onnx, head.onnx and tail.onnx; return the tensor between head and tail. Layer n returns `hn`."""
    rng, nodes, weights = np.random.default_rng(0), [], []
    source = "x"
    for layer in range(head_layers + tail_layers):
        weight = (rng.normal(size=(width, width)) * (2 / width) ** 0.5).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"w{layer}"))
        nodes.append(helper.make_node("MatMul", [source, f"w{layer}"], [f"m{layer}"]))
        nodes.append(helper.make_node("Relu", [f"m{layer}"], [f"h{layer}"]))
        source = f"h{layer}"
    shape = ["rows", width]
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", source)]
    graph = helper.make_graph(nodes, "layers", tensors[:1], tensors[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    model = onnx.shape_inference.infer_shapes(model)
    onnx.save(model, folder / "model.onnx")
    border = f"h{head_layers - 1}"
    extractor = Extractor(model)
    onnx.save(extractor.extract_model(["x"], [border]), folder / "head.onnx")
    onnx.save(extractor.extract_model([border], [source]), folder / "tail.onnx")
    return border
