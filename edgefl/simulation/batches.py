"""The batches of many clients, side by side: what each client's `train_epochs` would go through.

Clients are sorted by their number of steps, most first, so that those still at work at any step are
the first of the stack. A batch that is short is filled up with the client's first sample, and masked.
Invariant: client k's batches, without what is masked, are those of `edgefl.training.train_epochs`.
"""

# Shapes: K = clients in the stack, S = steps of the longest, B = batch size.

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgefl.config import TrainConfig
from edgefl.samples import Samples

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Step:
    """One batch of each of the first K clients."""

    inputs: torch.Tensor  # (K, B, ...)
    targets: torch.Tensor  # (K, B, ...)
    mask: torch.Tensor | None  # (K, B); None where every batch is full
    counts: torch.Tensor  # (K,) samples that count

    def __len__(self) -> int:
        return len(self.counts)


class StackedBatches:
    """All the steps of a stack of clients, whose samples come longest first."""

    def __init__(self, samples: Sequence[Samples], seeds: Sequence[int], config: TrainConfig) -> None:
        import torch

        self._inputs = torch.cat([one.inputs for one in samples])
        self._targets = torch.cat([one.targets for one in samples])
        self._num_steps = [config.epochs * math.ceil(len(one) / config.batch_size) for one in samples]
        shape = (self._num_steps[0], len(samples), min(config.batch_size, len(samples[0])))
        self._indices = torch.zeros(shape, dtype=torch.int32)  # (S, K, B)
        self._counts = torch.zeros(shape[:2], dtype=torch.int32)  # (S, K)
        first = 0
        for k, (one, seed) in enumerate(zip(samples, seeds, strict=True)):
            self._deal(k, first, _orders(len(one), seed, config.epochs), config.batch_size)
            first += len(one)

    def __iter__(self) -> Iterator[Step]:
        for s, (indices, counts) in enumerate(zip(self._indices, self._counts, strict=True)):
            num_active = sum(1 for steps in self._num_steps if steps > s)
            yield self._step(indices[:num_active], counts[:num_active])

    def _deal(self, k: int, first: int, orders: torch.Tensor, batch_size: int) -> None:
        """Write one client's batches; `orders` is (epochs, samples)."""
        epochs, length = orders.shape
        per_epoch = math.ceil(length / batch_size)
        for position in range(per_epoch):
            chosen = orders[:, position * batch_size : (position + 1) * batch_size]
            mine = slice(position, epochs * per_epoch, per_epoch)  # this batch of each epoch
            self._indices[mine, k, :] = first
            self._indices[mine, k, : chosen.shape[1]] = chosen + first
            self._counts[mine, k] = chosen.shape[1]

    def _step(self, indices: torch.Tensor, counts: torch.Tensor) -> Step:
        import torch

        device, widest = self._inputs.device, int(counts.max())
        chosen = indices[:, :widest].long().to(device)
        ragged = bool((counts < widest).any())
        mask = (torch.arange(widest) < counts[:, None]).to(device) if ragged else None
        return Step(self._inputs[chosen], self._targets[chosen], mask, counts.to(device))


def _orders(length: int, seed: int, epochs: int) -> torch.Tensor:
    """Return the shuffles that `train_epochs` draws, (epochs, length)."""
    import torch

    shuffle = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(length, generator=shuffle) for _ in range(epochs)]).int()
