"""Simplify a recorded graph: the same operations on the same numbers, with less overhead.

Small models spend much of a step on the dispatch of operations. Operations that only autograd needs, or that
give the same for every batch, are removed; the others are called through torch's own Python functions, which
parse their arguments three times faster than those of `torch.ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_Node = Any  # torch.fx.Node, whose arguments have no narrower type


def simplify(graph: torch.fx.Graph) -> None:
    """Remove detaches, double transposes and reshapes to the same shape; align the layouts of pooling, in place."""
    import torch

    aten = torch.ops.aten
    swaps = (aten.t.default, aten.transpose.int)
    reshapes = (aten.view.default, aten._unsafe_view.default, aten.expand.default)  # noqa: SLF001 - torch's own
    for node in list(graph.nodes):
        inner: _Node = node.args[0] if node.args else None
        if node.target is aten.detach.default:
            node.replace_all_uses_with(inner)
        elif node.target in swaps and getattr(inner, "target", None) is node.target and inner.args[1:] == node.args[1:]:
            node.replace_all_uses_with(inner.args[0])
        elif node.target in reshapes and inner.meta["val"].shape == node.meta["val"].shape:
            node.replace_all_uses_with(inner)
        elif node.target is aten.max_pool2d_with_indices_backward.default and _layouts_differ(inner, node.args[1]):
            with graph.inserting_before(node):  # the operation would convert it, too, but ten times slower
                moved = graph.call_function(aten.clone.default, (inner,), {"memory_format": torch.channels_last})
            node.replace_input_with(inner, moved)
    graph.eliminate_dead_code()


def _layouts_differ(gradient: _Node, inputs: _Node) -> bool:
    """Whether the inputs have channels last but the gradient does not."""
    import torch

    last = torch.channels_last
    gradient, inputs = gradient.meta["val"], inputs.meta["val"]
    return inputs.is_contiguous(memory_format=last) and not gradient.is_contiguous(memory_format=last)


def specialize(module: torch.fx.GraphModule, constants: Sequence[torch.Tensor] = ()) -> Callable[..., Any]:
    """Return the module's function with its first arguments fixed to these constants.

    The values of a constant may change in place; its memory must not move.
    """
    import torch

    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    hoisted = _hoist(graph, constants)
    _bind(graph)
    return partial(torch.fx.GraphModule(module, graph).forward, *constants, *hoisted)


def _hoist(graph: torch.fx.Graph, constants: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Replace views of the constants by new placeholders after those of the constants; return the views."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    values: dict[_Node, torch.Tensor] = dict(zip(placeholders, constants, strict=False))
    hoisted: list[torch.Tensor] = []
    after = placeholders[len(constants) - 1] if constants else None
    for node in list(graph.nodes):
        if node.op != "call_function" or not is_view(node.target) or node.args[0] not in values:
            continue
        values[node] = value = node.target(values[node.args[0]], *node.args[1:], **node.kwargs)
        with graph.inserting_after(after):
            after = graph.placeholder(f"hoisted_{len(hoisted)}")
        node.replace_all_uses_with(after)
        hoisted.append(value)
    graph.eliminate_dead_code()
    return hoisted


def is_view(target: object) -> bool:
    """Whether an operation returns a view of its first argument."""
    import torch

    return isinstance(target, torch._ops.OpOverload) and target.is_view  # noqa: SLF001 - has no public name


def _bind(graph: torch.fx.Graph) -> None:
    """Call operations through torch's functions and methods of the same name, if they exist."""
    import torch

    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):  # noqa: SLF001 - as above
            node.target = _bound(node.target) or node.target


def _bound(target: torch._ops.OpOverload) -> Callable[..., Any] | None:
    import torch

    name = target._schema.name.removeprefix("aten::")  # noqa: SLF001 - has no public name
    places = (torch._C._VariableFunctions, torch._C._nn, torch._C.TensorBase)  # noqa: SLF001 - as `torch` finds them
    found = (getattr(place, name, None) for place in places)
    return next((one for one in found if one is not None), None)
