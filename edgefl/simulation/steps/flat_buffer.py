"""A flat buffer: a model's tensors in one buffer per dtype, reset and subtracted in one operation each.

Invariant: the model's tensors, except those in `still`, are views of the buffers, under the
names of its state dict; a tensor shared between layers is stored once.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np

from edgefl.trees import Array, Tree, subtract
from edgefl.trees.tensors import array_of, tensor_of

if TYPE_CHECKING:
    import torch

ALIGNMENT = 64  # elements: tensors do not share cache lines


class FlatModel:
    """The buffers of one model; raises torch's error for a tensor that is not a plain array."""

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
        self._views: dict[str, tuple[torch.dtype, Any]] = {}  # name -> its place in a buffer
        for name, tensor in state.items():
            dtype, start = places[id(tensor)]
            view = _View(start, tuple(tensor.shape), moved=channels_last and tensor.dim() == 4)
            self._views[name] = (dtype, view)
            if tensor.data_ptr() != view(self._flats[dtype]).data_ptr():
                view(self._flats[dtype]).copy_(tensor.detach())
                tensor.data = view(self._flats[dtype])

    def start_from(self, parameters: Tree) -> None:
        """Set the values for `reset`; the tree must match the model, which the caller has checked."""
        for name, (dtype, view) in self._views.items():
            view(self._starts[dtype]).copy_(tensor_of(np.array(parameters[name])))

    def reset(self) -> None:
        """Reset the model to the start values."""
        for dtype, flat in self._flats.items():
            flat.copy_(self._starts[dtype])

    def delta(self) -> dict[str, Array]:
        """Return the change since the start, as new arrays."""
        moved = {dtype: _difference(flat, self._starts[dtype]) for dtype, flat in self._flats.items()}
        return {name: array_of(view(moved[dtype])) for name, (dtype, view) in self._views.items()}

    def moved(self) -> Tree:
        """Return the change since the start, in the model's own memory: call `reset` before the next step."""
        for dtype, flat in self._flats.items():
            if dtype.is_floating_point:
                flat.sub_(self._starts[dtype])
            else:
                flat.copy_(_difference(flat, self._starts[dtype]))
        if self._own is None or next(iter(self._flats.values())).is_cuda:
            self._own = {name: array_of(view(self._flats[dtype])) for name, (dtype, view) in self._views.items()}
        return self._own


class _View:
    """A tensor's place in a buffer, and its layout: channels last for convolutions."""

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
