"""Clients' samples, kept side by side in large slabs.

Each in memory of its own would lie between what training allocates and frees, and leave holes there that
nothing fits into: a process grew by several times the bytes of the samples.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgefl.training.samples import Samples

if TYPE_CHECKING:
    import torch

SLAB_BYTES = 64 << 20  # beyond what malloc takes from its heap; pages that nothing is written to cost nothing
ALIGNMENT = 64  # bytes


class Shelf:
    """Samples by client, of at most so many bytes: beyond that, those of the oldest slab are forgotten."""

    def __init__(self, max_bytes: int, slab_bytes: int = SLAB_BYTES) -> None:
        self._max_bytes, self._slab_bytes = max_bytes, slab_bytes
        self._slabs: deque[_Slab] = deque()
        self._kept: dict[str, Samples] = {}

    def get(self, client: str) -> Samples | None:
        return self._kept.get(client)

    def put(self, client: str, samples: Samples) -> Samples:
        """Keep a copy, and return it."""
        size = _aligned(samples.inputs.nbytes) + _aligned(samples.targets.nbytes)
        if not self._slabs or self._slabs[-1].left < size:
            self._add_slab(max(size, self._slab_bytes), samples.inputs.device)
        slab = self._slabs[-1]
        slab.clients.append(client)
        self._kept[client] = kept = Samples(slab.put(samples.inputs), slab.put(samples.targets))
        return kept

    def _add_slab(self, size: int, device: torch.device) -> None:
        import torch

        self._slabs.append(_Slab(torch.empty(size, dtype=torch.uint8, device=device)))
        while len(self._slabs) > 1 and sum(slab.memory.numel() for slab in self._slabs) > self._max_bytes:
            for client in self._slabs.popleft().clients:
                del self._kept[client]


@dataclass(slots=True)
class _Slab:
    memory: torch.Tensor  # bytes
    used: int = 0
    clients: list[str] = field(default_factory=list)

    @property
    def left(self) -> int:
        return self.memory.numel() - self.used

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        place = self.memory[self.used : self.used + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        place.copy_(tensor)
        self.used += _aligned(tensor.nbytes)
        return place


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
