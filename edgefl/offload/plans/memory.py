"""How much memory a device needs for the head of a cut: its weights, and the activations that are alive at once.

A tensor is alive from the layer that makes it to the last one that reads it; what crosses the cut, and the outputs of
the model, stay alive to the end. ONNX Runtime's arena may hold more (it keeps what an earlier run needed), the process
around it does: this is what the model itself cannot do without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

from edgefl.offload.graph import ModelGraph


def peak_activations(graph: ModelGraph, num_bytes: Mapping[str, int]) -> list[int]:
    """Return for each number of layers in the head, 0 to all, the most bytes of activations alive at once.

    A tensor that crosses a cut is alive in the whole model, too, for as long: it is read behind the cut. So the peak
    of a head is the largest of the whole model's running sums up to there, and one pass gives all.
    """
    ends = {name: max(graph.last_use.get(name, at), at) for name, at in graph.made_by.items()}
    ends |= {name: len(graph.layers) for name in graph.outputs if name in ends}
    changes = [0] * (len(graph.layers) + 2)
    for name, at in graph.made_by.items():
        changes[max(at, 0)] += num_bytes[name]
        changes[ends[name] + 1] -= num_bytes[name]
    alive = accumulate(changes[: len(graph.layers)])
    return [0, *accumulate(alive, max)]


def head_bytes(graph: ModelGraph, num_bytes: Mapping[str, int], parameter_bytes: Sequence[int]) -> list[int]:
    """Return the bytes of each head: its weights (for each number of layers, 0 to all) and its activations."""
    peaks = peak_activations(graph, num_bytes)
    return [weights + peak for weights, peak in zip(parameter_bytes, peaks, strict=True)]
