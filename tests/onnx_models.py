"""Small ONNX models for tests: a quick one, and those that a server has to survive."""

from __future__ import annotations

from collections.abc import Sequence

from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper

FLOAT, INT32, INT64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64


def affine(scale: float = 2.0, features: int = 3) -> bytes:
    """y = x * scale + 1 over x of FP32[-1, features]."""
    return _model(
        [helper.make_node("Mul", ["x", "scale"], ["scaled"]), helper.make_node("Add", ["scaled", "one"], ["y"])],
        [_value("x", FLOAT, ["batch", features])],
        [_value("y", FLOAT, ["batch", features])],
        scale=scale,
        one=1.0,
    )


def counter() -> bytes:
    """Counts to `times`, one step after the other: as slow as its input says."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Add", ["count", "one"], ["next"])],
        "body",
        [_value("i", INT64, []), _value("go", TensorProto.BOOL, []), _value("count", FLOAT, [])],
        [_value("on", TensorProto.BOOL, []), _value("next", FLOAT, [])],
    )
    return _model(
        [helper.make_node("Loop", ["times", "yes", "zero"], ["counted"], body=body)],
        [_value("times", INT64, [])],
        [_value("counted", FLOAT, [])],
        yes=True,
        zero=0.0,
        one=1.0,
    )


def endless_start(rounds: int = 2**40) -> bytes:
    """Loads, and never ends its first run, whatever it is given."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Add", ["total", "x"], ["next"])],
        "body",
        [_value("i", INT64, []), _value("go", TensorProto.BOOL, []), _value("total", FLOAT, ["batch", 3])],
        [_value("on", TensorProto.BOOL, []), _value("next", FLOAT, ["batch", 3])],
    )
    return _model(
        [helper.make_node("Loop", ["times", "yes", "x"], ["y"], body=body)],
        [_value("x", FLOAT, ["batch", 3])],
        [_value("y", FLOAT, ["batch", 3])],
        times=rounds,
        yes=True,
    )


def divider() -> bytes:
    """y = a / b over INT32: -2**31 / -1 is SIGFPE in the kernel."""
    sizes = ["batch", 1]
    return _model(
        [helper.make_node("Div", ["a", "b"], ["y"])],
        [_value("a", INT32, sizes), _value("b", INT32, sizes)],
        [_value("y", INT32, sizes)],
    )


def crash_at_start() -> bytes:
    """Divides -2**31 by -1 in its very first run, whatever it is given: SIGFPE in the warm-up."""
    return _model(
        [
            helper.make_node("Mul", ["x", "zero"], ["none"]),
            helper.make_node("Add", ["none", "least"], ["a"]),
            helper.make_node("Sub", ["none", "one"], ["b"]),
            helper.make_node("Div", ["a", "b"], ["y"]),
        ],
        [_value("x", INT32, ["batch", 3])],
        [_value("y", INT32, ["batch", 3])],
        zero=helper.make_tensor("zero", INT32, [], [0]),
        least=helper.make_tensor("least", INT32, [], [-(2**31)]),
        one=helper.make_tensor("one", INT32, [], [1]),
    )


def outer() -> bytes:
    """The sum over every pair of x's elements: n numbers in, n * n of them in memory, one out."""
    return _model(
        [
            helper.make_node("Unsqueeze", ["x", "last"], ["column"]),
            helper.make_node("Unsqueeze", ["x", "first"], ["row"]),
            helper.make_node("Mul", ["column", "row"], ["pairs"]),
            helper.make_node("ReduceSum", ["pairs"], ["y"], keepdims=0),
        ],
        [_value("x", FLOAT, ["n"])],
        [_value("y", FLOAT, [])],
        last=helper.make_tensor("last", INT64, [1], [1]),
        first=helper.make_tensor("first", INT64, [1], [0]),
    )


def hungry_start(gigabytes: int = 8) -> bytes:
    """Asks for so much memory in its very first run, whatever it is given."""
    return _model(
        [
            helper.make_node("ConstantOfShape", ["size"], ["zeros"]),
            helper.make_node("ReduceSum", ["zeros"], ["total"], keepdims=0),
            helper.make_node("Add", ["x", "total"], ["y"]),
        ],
        [_value("x", FLOAT, ["batch", 3])],
        [_value("y", FLOAT, ["batch", 3])],
        size=helper.make_tensor("size", INT64, [1], [gigabytes << 28]),
    )


def _model(
    nodes: Sequence[NodeProto],
    inputs: Sequence[ValueInfoProto],
    outputs: Sequence[ValueInfoProto],
    **constants: float | TensorProto,
) -> bytes:
    import onnx

    known = [
        value if isinstance(value, TensorProto) else helper.make_tensor(name, _type_of(value), [], [value])
        for name, value in constants.items()
    ]
    graph: GraphProto = helper.make_graph(nodes, "graph", inputs, outputs, known)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _type_of(value: float) -> int:
    return {bool: TensorProto.BOOL, int: INT64, float: FLOAT}[type(value)]


def _value(name: str, datatype: int, sizes: Sequence[int | str]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, datatype, sizes)
