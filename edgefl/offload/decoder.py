"""A small network that inverts the head of a split model: pictures from what crosses the cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgefl.trees import Array, Tree

if TYPE_CHECKING:
    import torch

_COARSE = 8  # the decoder begins with maps of at least so many pixels on a side


def train_decoder(seen: Tree, truth: Array, later: Tree, *, steps: int, batch: int, width: int) -> Array:
    """Return reconstructions (N, C, H, W) of what made `later`, by a decoder trained on `seen` and `truth`.

    The caller seeds torch. Adam at 2e-3 on the squared error, pictures scaled to mean 0 and deviation 1.
    """
    import torch

    mean, std = float(truth.mean()), float(truth.std()) or 1.0
    given, wanted = _tensors(seen, seen), torch.from_numpy((truth - mean) / std).float()
    model = _network([tuple(one.shape[1:]) for one in given], (truth.shape[1], *truth.shape[2:]), width)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(steps):
        chosen = torch.randint(len(wanted), (min(batch, len(wanted)),))
        loss = (model([one[chosen] for one in given]) - wanted[chosen]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        made: Array = model.eval()(_tensors(later, seen)).numpy()
    return made * std + mean


def _tensors(features: Tree, of: Tree) -> list[torch.Tensor]:
    """Return features scaled by those of the training half."""
    import torch

    found = []
    for name, one in features.items():
        mean, std = float(of[name].mean(dtype=np.float64)), float(of[name].std(dtype=np.float64)) or 1.0
        found.append(torch.from_numpy((one.astype(np.float32) - mean) / std).float())
    return found


def _network(shapes: list[tuple[int, ...]], picture: tuple[int, int, int], width: int) -> torch.nn.Module:
    from torch import nn

    channels, height, across = picture
    coarse = (min(_COARSE, height), min(_COARSE, across))

    class Entry(nn.Module):
        """One tensor as maps of `width` channels: maps are resized, anything else goes through a dense layer."""

        def __init__(self, shape: tuple[int, ...]) -> None:
            super().__init__()
            self.is_map = len(shape) == 3
            size = int(np.prod(shape))
            self.layer = nn.Conv2d(shape[0], width, 3, padding=1) if self.is_map else nn.Linear(
                size, width * coarse[0] * coarse[1]
            )  # fmt: skip

        def forward(self, one: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = self.layer(one if self.is_map else one.flatten(1))
            return made if self.is_map else made.reshape(len(made), width, *coarse)

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.entries = nn.ModuleList(Entry(shape) for shape in shapes)
            self.middle = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
            self.last = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
                                      nn.Conv2d(width, channels, 3, padding=1))  # fmt: skip

        def forward(self, given: list[torch.Tensor]) -> torch.Tensor:
            maps = [entry(one) for entry, one in zip(self.entries, given, strict=True)]
            size = max((tuple(one.shape[2:]) for one in maps), key=lambda one: one[0] * one[1])
            summed = sum(nn.functional.interpolate(one, size=size, mode="bilinear") for one in maps)
            wide = nn.functional.interpolate(self.middle(summed), size=(height, across), mode="bilinear")
            made: torch.Tensor = self.last(wide)
            return made

    return Decoder()
