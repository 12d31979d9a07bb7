"""Gradients that are products of two matrices, left as such: a step adds them to the weights as they multiply.

    w <- w - lr * (a @ b)        by one BLAS call, which accumulates into w

The gradient of a dense layer is never written and read again, which is most of what a small step moves
through memory. It rounds once less than `w - lr * g` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgefl.simulation.steps.simplify import is_view

if TYPE_CHECKING:
    import torch

_Node = Any  # torch.fx.Node, whose arguments have no narrower type
Places = Sequence[tuple[int, ...]]  # among a recording's outputs: of each gradient, or of its two factors


@dataclass(frozen=True, slots=True)
class Gradients:
    """What a step's outputs are: gradients, or factors of them, and the loss, 0-d or (K,), at the end."""

    outputs: Sequence[Any]
    places: Places

    @property
    def loss(self) -> torch.Tensor:
        loss: torch.Tensor = self.outputs[-1]
        return loss

    def multiplied(self) -> list[torch.Tensor | None]:
        """Return the gradients themselves, None for a parameter that the loss does not depend on."""
        return [self.outputs[p[0]] if len(p) == 1 else self.outputs[p[0]] @ self.outputs[p[1]] for p in self.places]

    def descend(self, tensors: Sequence[torch.Tensor], lr: float) -> None:
        """Move each gradient's tensor against it, in place."""
        import torch

        others: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []
        for tensor, place in zip(tensors, self.places, strict=True):
            first = self.outputs[place[0]]
            if len(place) == 2:
                add = tensor.addmm_ if first.dim() == 2 else tensor.baddbmm_
                add(first, self.outputs[place[1]], alpha=-lr)
            elif first is not None:
                others.append(tensor)
                gradients.append(first)
        if others:
            torch._foreach_add_(others, gradients, alpha=-lr)


def in_order(number: int) -> Places:
    """Return the places of gradients that are all multiplied out."""
    return [(i,) for i in range(number)]


def factor(graph: torch.fx.Graph, number: int) -> Places:
    """Let a graph, whose first placeholders are so many parameters, return factors where it returned their product.

    Not where a factor is memory of a parameter, which another step may have moved before it is multiplied.
    """
    import torch

    aten = torch.ops.aten
    (output,) = (node for node in graph.nodes if node.op == "output")
    parameters = {node for node, _ in zip(graph.nodes, range(number), strict=False)}
    places: list[tuple[int, ...]] = []
    outputs: list[_Node] = []
    for gradient in output.args[0][:number]:
        product = getattr(gradient, "target", None) in (aten.mm.default, aten.bmm.default)
        apart = product and len(gradient.users) == 1 and output.args[0].count(gradient) == 1
        if apart and not any(_memory_of(one) in parameters for one in gradient.args):
            places.append((len(outputs), len(outputs) + 1))
            outputs += gradient.args
        else:
            places.append((len(outputs),))
            outputs.append(gradient)
    output.args = ((*outputs, *output.args[0][number:]),)
    graph.eliminate_dead_code()
    return places


def _memory_of(node: _Node) -> _Node:
    """Return the node whose memory this one is."""
    import torch

    unsafe = torch.ops.aten._unsafe_view.default  # noqa: SLF001 - torch's own name
    while node.op == "call_function" and (is_view(node.target) or node.target is unsafe):
        node = node.args[0]
    return node
