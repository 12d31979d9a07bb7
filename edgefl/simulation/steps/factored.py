"""Factored gradients: keep a dense layer's gradient as its two factors, and multiply them into the weights.

    w <- w - lr * (a @ b)        in one BLAS call, which accumulates into w

The gradient itself is never written to memory, which saves most of the memory traffic of a small
step. The result has one rounding less than `w - lr * g`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgefl.simulation.steps.simplify import is_view

if TYPE_CHECKING:
    import torch

_Node = Any  # torch.fx.Node, whose arguments have no narrower type
OutputIndices = Sequence[tuple[int, ...]]  # per gradient: its index among the outputs, or those of its two factors


@dataclass(frozen=True, slots=True)
class FactoredGradients:
    """The outputs of a step: each gradient, whole or as two factors, then the loss, 0-d or (K,)."""

    outputs: Sequence[Any]
    indices: OutputIndices

    @property
    def loss(self) -> torch.Tensor:
        loss: torch.Tensor = self.outputs[-1]
        return loss

    def materialized(self) -> list[torch.Tensor | None]:
        """Return the whole gradients, None for a parameter that the loss does not depend on."""
        return [self.outputs[i[0]] if len(i) == 1 else self.outputs[i[0]] @ self.outputs[i[1]] for i in self.indices]

    def apply(self, tensors: Sequence[torch.Tensor], lr: float) -> None:
        """Do `tensor -= lr * gradient` for each gradient's tensor, in place."""
        import torch

        others: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []
        for tensor, index in zip(tensors, self.indices, strict=True):
            first = self.outputs[index[0]]
            if len(index) == 2:
                add = tensor.addmm_ if first.dim() == 2 else tensor.baddbmm_
                add(first, self.outputs[index[1]], alpha=-lr)
            elif first is not None:
                others.append(tensor)
                gradients.append(first)
        if others:
            torch._foreach_add_(others, gradients, alpha=-lr)


def unfactored(number: int) -> OutputIndices:
    """Return the output indices for `number` whole gradients."""
    return [(i,) for i in range(number)]


def factor_gradients(graph: torch.fx.Graph, number: int) -> OutputIndices:
    """Make a graph return the two factors of a gradient instead of their product; return the output indices.

    `number` parameters are its first placeholders. A gradient stays whole if a factor shares memory with a
    parameter, because applying another gradient may change that parameter first.
    """
    import torch

    aten = torch.ops.aten
    (output,) = (node for node in graph.nodes if node.op == "output")
    parameters = {node for node, _ in zip(graph.nodes, range(number), strict=False)}
    indices: list[tuple[int, ...]] = []
    outputs: list[_Node] = []
    for gradient in output.args[0][:number]:
        is_product = getattr(gradient, "target", None) in (aten.mm.default, aten.bmm.default)
        factorable = is_product and len(gradient.users) == 1 and output.args[0].count(gradient) == 1
        if factorable and not any(_memory_of(one) in parameters for one in gradient.args):
            indices.append((len(outputs), len(outputs) + 1))
            outputs += gradient.args
        else:
            indices.append((len(outputs),))
            outputs.append(gradient)
    output.args = ((*outputs, *output.args[0][number:]),)
    graph.eliminate_dead_code()
    return indices


def _memory_of(node: _Node) -> _Node:
    """Return the node whose memory this one is a view of."""
    import torch

    unsafe = torch.ops.aten._unsafe_view.default  # noqa: SLF001 - torch's own name
    while node.op == "call_function" and (is_view(node.target) or node.target is unsafe):
        node = node.args[0]
    return node
