"""One step of a `torch.optim` optimizer over parameters that do not fit into memory, piece by piece.

An element-wise optimizer steps pieces of at most `PIECE_ELEMENTS`: neighbouring small tensors, or a part of a large
one. Any other uses a tensor's rows and columns, so its pieces are whole tensors, and it needs memory for the largest:
about six times that tensor, which is logged. The new parameters and the new state are in temporary files, the old ones
are only read, so a step that fails changes nothing.

State: `INDEX.SLOT` for each piece and entry, like the state of smaller parameters. An element-wise state is read by
the elements' positions, so a state that was written with pieces of another size continues, with the same bits.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from edgefl.logs import event
from edgefl.trees import Array, TensorSpec, Tree, read_block, spec_of
from edgefl.trees.scratch import ScratchTree
from edgefl.trees.tensors import array_of, tensor_of

# The element-wise optimizers of torch.optim; the others use a tensor's rows or columns.
ELEMENTWISE = frozenset(
    {"ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"}
)
SCALARS = frozenset({"step", "eta", "mu", "mu_product"})  # entries of their state that are the same for all elements
PIECE_ELEMENTS = 1 << 20  # with parameters, gradient, state and temporaries some tens of megabytes
TENSORS_NEEDED = 6  # parameters, gradient, two of state, two temporaries

Piece = Sequence[tuple[str, slice]]  # parts of flattened tensors of one dtype, in order
Make = Callable[[list[Any]], Any]  # makes an optimizer of some torch parameters

_log = logging.getLogger(__name__)


class LargeStep:
    """One step over the trained tensors."""

    def __init__(self, make: Make, trained: Mapping[str, TensorSpec], state: Tree, *, elementwise: bool) -> None:
        self._make, self._trained, self._elementwise = make, trained, elementwise
        self._old = _Positions(state) if elementwise else None
        self._state = state
        if not elementwise:
            largest = max((one.num_bytes for one in trained.values()), default=0)
            event(_log, logging.INFO, "server.step_by_tensors", needs_mb=round(TENSORS_NEEDED * largest / 1e6))

    def run(self, parameters: Tree, mean: Tree, *, is_delta: bool) -> tuple[ScratchTree, ScratchTree]:
        """Return the new trained parameters and the new state."""
        import torch

        new, state, start = ScratchTree(self._trained), ScratchTree(), 0
        for index, piece in enumerate(self._pieces()):
            parameter = torch.nn.Parameter(tensor_of(self._joined(piece, parameters)))
            gradient = tensor_of(self._joined(piece, mean))
            parameter.grad = -gradient if is_delta else gradient
            optimizer = self._make([parameter])
            self._restore(optimizer, index, start, parameter.numel())
            optimizer.step()
            for slot, value in optimizer.state_dict()["state"].get(0, {}).items():
                if value is not None:
                    state.append(f"{index}.{slot}", np.array(array_of(value) if torch.is_tensor(value) else value))
            self._write(piece, array_of(parameter).reshape(-1), new)
            start += parameter.numel()
        return new, state

    def _pieces(self) -> Iterator[Piece]:
        if not self._elementwise:
            yield from ([(name, slice(0, one.size))] for name, one in self._trained.items())
            return
        piece: list[tuple[str, slice]] = []
        room, dtype = PIECE_ELEMENTS, None
        for name, one in self._trained.items():
            at = 0
            while at < one.size:
                if piece and (not room or one.dtype != dtype):
                    yield piece
                    piece, room = [], PIECE_ELEMENTS
                stop = min(one.size, at + room)
                piece.append((name, slice(at, stop)))
                room, at, dtype = room - (stop - at), stop, one.dtype
        if piece:
            yield piece

    def _joined(self, piece: Piece, tree: Tree) -> Array:
        """Return the values of a piece in a new array; a whole tensor keeps its shape."""
        values = np.concatenate([read_block(tree, name, block) for name, block in piece])
        return values if self._elementwise else values.reshape(self._trained[piece[0][0]].shape)

    def _write(self, piece: Piece, values: Array, new: ScratchTree) -> None:
        start = 0
        for name, block in piece:
            stop = start + block.stop - block.start
            new.write(name, block, values[start:stop])
            start = stop

    def _restore(self, optimizer: Any, index: int, start: int, count: int) -> None:
        """Give an optimizer of one piece the state from before."""
        if not self._state:
            return
        if self._old is not None:
            slots = self._old.read(start, start + count)
        else:
            prefix = f"{index}."
            slots = {key[len(prefix) :]: self._state[key] for key in self._state if key.startswith(prefix)}
        if slots:
            state = {0: {slot: tensor_of(np.array(array)) for slot, array in slots.items()}}
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


class _Positions:
    """The state of an element-wise optimizer by the positions of elements, however it was divided."""

    def __init__(self, state: Tree) -> None:
        self._state = state
        self._entries: dict[str, list[tuple[int, int, str]]] = {}  # slot -> (start, stop, key), in order
        self._scalars: dict[str, str] = {}  # slot -> key of the first
        spec = spec_of(state)
        for key in sorted(spec, key=lambda one: int(one.partition(".")[0])):
            slot = key.partition(".")[2]
            if slot in SCALARS:
                self._scalars.setdefault(slot, key)
                continue
            entries = self._entries.setdefault(slot, [])
            start = entries[-1][1] if entries else 0
            entries.append((start, start + spec[key].size, key))

    def read(self, start: int, stop: int) -> dict[str, Array]:
        """Return the entries of these elements."""
        found = {slot: self._state[key] for slot, key in self._scalars.items()}
        for slot, entries in self._entries.items():
            values, at = [], bisect.bisect_right(entries, start, key=lambda entry: entry[1])
            while at < len(entries) and entries[at][0] < stop:
                first, last, key = entries[at]
                values.append(read_block(self._state, key, slice(max(start, first) - first, min(stop, last) - first)))
                at += 1
            found[slot] = np.concatenate(values)
        return found
