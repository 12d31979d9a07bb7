"""A flat buffer: a model's tensors side by side in one buffer per dtype, reset and subtracted in one operation each.

Invariant: the model's tensors, but for those that are to be left `still`, are views of the buffers, under the
names of its state dict; tensors that it shares between layers are one.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np

from edgefl.trees import Array, Tree, subtract
from edgefl.trees.tensors import array_of, tensor_of

if TYPE_CHECKING:
    import torch

ALIGNMENT = 64  # elements: no tensor shares a cache line with another


class FlatModel:
    """The buffers under one model; raises what torch raises for a tensor that is no plain array."""

    def __init__(self, model: torch.nn.Module, *, channels_last: bool = False, still: Collection[str] = ()) -> None:
        import torch

        state = {name: one for name, one in model.state_dict(keep_vars=True).items() if name not in still}
        ends: dict[torch.dtype, int] = {}
        places: dict[int, tuple[torch.dtype, int]] = {}
        for tensor in state.values():
            if id(tensor) not in places:
                start = ends.get(tensor.dtype, 0)
                places[id(tensor)] = (tensor.dtype, start)
                ends[tensor.dtype] = start - -tensor.numel() // ALIGNMENT * ALIGNMENT
        device = next(iter(state.values())).device if state else None
        self._flats = {dtype: torch.zeros(end, dtype=dtype, device=device) for dtype, end in ends.items()}
        self._starts = {dtype: flat.clone() for dtype, flat in self._flats.items()}
        self._own: dict[str, Array] | None = None  # views of the buffers
        self._views: dict[str, tuple[torch.dtype, Any]] = {}  # name -> its place in any buffer
        for name, tensor in state.items():
            dtype, start = places[id(tensor)]
            view = _View(start, tuple(tensor.shape), moved=channels_last and tensor.dim() == 4)
            self._views[name] = (dtype, view)
            if tensor.data_ptr() != view(self._flats[dtype]).data_ptr():
                view(self._flats[dtype]).copy_(tensor.detach())
                tensor.data = view(self._flats[dtype])

    def start_from(self, parameters: Tree) -> None:
        """Take up what the model is set back to; the tree is the model's, as a check has said."""
        for name, (dtype, view) in self._views.items():
            view(self._starts[dtype]).copy_(tensor_of(np.array(parameters[name])))

    def reset(self) -> None:
        """Set the model back."""
        for dtype, flat in self._flats.items():
            flat.copy_(self._starts[dtype])

    def delta(self) -> dict[str, Array]:
        """Return what has changed since, in arrays of its own."""
        moved = {dtype: _difference(flat, self._starts[dtype]) for dtype, flat in self._flats.items()}
        return {name: array_of(view(moved[dtype])) for name, (dtype, view) in self._views.items()}

    def moved(self) -> Tree:
        """Return what has changed since, in the model's own memory, which it takes: reset before the next step."""
        for dtype, flat in self._flats.items():
            if dtype.is_floating_point:
                flat.sub_(self._starts[dtype])
            else:
                flat.copy_(_difference(flat, self._starts[dtype]))
        if self._own is None or next(iter(self._flats.values())).is_cuda:
            self._own = {name: array_of(view(self._flats[dtype])) for name, (dtype, view) in self._views.items()}
        return self._own


class _View:
    """Where a tensor lies in a buffer, and in what order: channels last, where convolutions want them so."""

    def __init__(self, start: int, shape: tuple[int, ...], *, moved: bool) -> None:
        self._start, self._shape, self._moved = start, shape, moved
        self._end = start + int(np.prod(shape, dtype=np.int64))

    def __call__(self, flat: torch.Tensor) -> torch.Tensor:
        part = flat[self._start : self._end]
        if not self._moved:
            return part.view(self._shape)
        out, channels, height, width = self._shape
        return part.view(out, height, width, channels).permute(0, 3, 1, 2)


def _difference(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    import torch

    if new.is_floating_point():
        return (new - old).cpu()
    return torch.from_numpy(np.asarray(subtract(new.cpu().numpy(), old.cpu().numpy())))
