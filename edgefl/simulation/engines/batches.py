"""The batches of many clients, side by side: what each client's `train_epochs` would go through.

Clients are sorted by their number of steps, most first, so that those still at work at any step are
the first of the stack. A batch that is short is filled up with the client's first sample, and masked.
Invariant: client k's batches, without what is masked, are those of `edgefl.training.local.train_epochs`.
"""

# Shapes: K = clients in the stack, S = steps of the longest, B = batch size.

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from edgefl.config import TrainConfig
from edgefl.training.samples import Samples

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
    """All the steps of a stack of clients; who has the most samples comes first."""

    def __init__(self, samples: Sequence[Samples], seeds: Sequence[int], config: TrainConfig) -> None:
        import torch

        self._inputs = torch.cat([one.inputs for one in samples])
        self._targets = torch.cat([one.targets for one in samples])
        self._num_steps = [config.epochs * math.ceil(len(one) / config.batch_size) for one in samples]
        shape = (self._num_steps[0], len(samples), min(config.batch_size, len(samples[0])))
        self._indices = torch.zeros(shape, dtype=torch.int32)  # (S, K, B)
        self._counts = torch.zeros(shape[:2], dtype=torch.int32)  # (S, K)
        shuffle, first = torch.Generator(), 0  # the first sample, in the tensors of all
        for length, group in groupby(range(len(samples)), key=lambda k: len(samples[k])):
            alike = list(group)
            orders = _orders(length, [seeds[k] for k in alike], config.epochs, shuffle)
            self._deal(slice(alike[0], alike[-1] + 1), first, orders, config.batch_size)
            first += length * len(alike)

    def __iter__(self) -> Iterator[Step]:
        for s, (indices, counts) in enumerate(zip(self._indices, self._counts, strict=True)):
            num_active = sum(1 for steps in self._num_steps if steps > s)
            yield self._step(indices[:num_active], counts[:num_active])

    def _deal(self, clients: slice, first: int, orders: torch.Tensor, batch_size: int) -> None:
        """Write the batches of clients with as many samples each; `orders` is (clients, epochs, samples)."""
        import torch

        num_clients, epochs, length = orders.shape
        per_epoch, width = math.ceil(length / batch_size), self._indices.shape[2]
        firsts = first + length * torch.arange(num_clients, dtype=torch.int32)[:, None, None]
        filled = firsts.repeat(1, epochs, per_epoch * width)
        filled[:, :, :length] += orders
        self._indices[: epochs * per_epoch, clients] = filled.view(num_clients, -1, width).transpose(0, 1)
        counts = torch.tensor([min(batch_size, length - start) for start in range(0, length, batch_size)])
        self._counts[: epochs * per_epoch, clients] = counts.int().repeat(epochs)[:, None]

    def _step(self, indices: torch.Tensor, counts: torch.Tensor) -> Step:
        import torch

        device, widest = self._inputs.device, int(counts.max())
        chosen = indices[:, :widest].long().to(device)
        ragged = bool((counts < widest).any())
        mask = (torch.arange(widest) < counts[:, None]).to(device) if ragged else None
        return Step(self._inputs[chosen], self._targets[chosen], mask, counts.to(device))


def _orders(length: int, seeds: Sequence[int], epochs: int, shuffle: torch.Generator) -> torch.Tensor:
    """Return the shuffles that `train_epochs` draws for these seeds, (seeds, epochs, length)."""
    import torch

    orders = []
    for seed in seeds:
        shuffle.manual_seed(seed)
        orders += [torch.randperm(length, generator=shuffle) for _ in range(epochs)]
    return torch.stack(orders).int().view(len(seeds), epochs, length)
