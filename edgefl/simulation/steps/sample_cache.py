"""A cache of clients' samples in large blocks of memory.

With one allocation per client, samples would be mixed with the memory that training allocates and frees, and the
heap would fragment: processes grew by several times the size of the samples.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgefl.training.samples import Samples
from edgefl.training.structures import leaves, mapped

if TYPE_CHECKING:
    import torch

BLOCK_BYTES = 64 << 20  # too large for malloc's heap; unused pages cost nothing
ALIGNMENT = 64  # bytes


class SampleCache:
    """Samples by client, at most `max_bytes`: beyond that, the oldest block is evicted."""

    def __init__(self, max_bytes: int, block_bytes: int = BLOCK_BYTES) -> None:
        self._max_bytes, self._block_bytes = max_bytes, block_bytes
        self._blocks: deque[_Block] = deque()
        self._kept: dict[str, Samples] = {}

    def get(self, client: str) -> Samples | None:
        return self._kept.get(client)

    def put(self, client: str, samples: Samples) -> Samples:
        """Store a copy, and return it."""
        size = sum(_aligned(one.nbytes) for part in (samples.inputs, samples.targets) for one in leaves(part))
        if not self._blocks or self._blocks[-1].left < size:
            self._add_block(max(size, self._block_bytes), samples.device)
        block = self._blocks[-1]
        block.clients.append(client)
        kept = Samples(mapped(block.put, samples.inputs), mapped(block.put, samples.targets))
        self._kept[client] = kept
        return kept

    def _add_block(self, size: int, device: torch.device) -> None:
        import torch

        self._blocks.append(_Block(torch.empty(size, dtype=torch.uint8, device=device)))
        while len(self._blocks) > 1 and sum(block.memory.numel() for block in self._blocks) > self._max_bytes:
            for client in self._blocks.popleft().clients:
                del self._kept[client]


@dataclass(slots=True)
class _Block:
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
