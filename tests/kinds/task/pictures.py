"""Models of pictures with an output for each pixel."""

from __future__ import annotations

import numpy as np
import torch
from common import normal, torch_task
from torch import nn

SIZE = 8


def blobs(rng, count):
    """Return noisy pictures of squares, and which pixels are theirs."""
    rows, columns = rng.integers(1, SIZE - 3, size=(2, count, 1, 1))
    y, x = np.mgrid[:SIZE, :SIZE]
    inside = (y >= rows) & (y < rows + 3) & (x >= columns) & (x < columns + 3)
    pictures = inside[:, None] + 0.3 * normal(rng, count, 1, SIZE, SIZE)
    return pictures.astype(np.float32), inside.astype(np.int64)


def plain():
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 2, 1)
    )


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.middle = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.up, self.head = nn.Conv2d(48, 16, 3, padding=1), nn.Conv2d(16, 2, 1)

    def forward(self, pictures):
        first = torch.relu(self.down(pictures))
        low = torch.relu(self.middle(nn.functional.max_pool2d(first, 2)))
        high = nn.functional.interpolate(low, scale_factor=2, mode="bilinear", align_corners=False)
        return self.head(torch.relu(self.up(torch.cat([high, first], dim=1))))


segmentation = torch_task("segmentation", plain, nn.functional.cross_entropy, blobs)
u_net = torch_task("u_net", UNet, nn.functional.cross_entropy, blobs)
