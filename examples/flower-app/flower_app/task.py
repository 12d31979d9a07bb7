"""Model, data and training: 8x8 digits from scikit-learn's own wheel, nothing is downloaded.

Deterministic: the same run config gives the same model, whatever the order in which clients train.
"""

from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

HELD_OUT = 360  # a fifth of 1,797 pictures: the server's


class Net(nn.Module):
    """A small CNN: 101,626 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(64 * 4 * 4, 80), nn.ReLU(), nn.Linear(80, 10))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """(N, 1, 8, 8) to (N, 10)."""
        return self.head(self.features(pictures))


def make_model(seed: int) -> Net:
    """Make the model that a federation starts from."""
    torch.manual_seed(seed)
    return Net()


@cache
def load_all() -> tuple[torch.Tensor, torch.Tensor]:
    """Return all pictures and labels, shuffled once and for all."""
    digits = load_digits()
    order = np.random.default_rng(20).permutation(len(digits.target))
    pictures = torch.tensor(digits.images[order, None] / 16, dtype=torch.float32)
    return pictures, torch.tensor(digits.target[order], dtype=torch.int64)


def load_part(part: int, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return every `parts`-th of the pictures that are not held out."""
    pictures, labels = load_all()
    return pictures[HELD_OUT + part :: parts], labels[HELD_OUT + part :: parts]


def load_held_out() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pictures that no client trains on."""
    pictures, labels = load_all()
    return pictures[:HELD_OUT], labels[:HELD_OUT]


def train(net: Net, data: tuple[torch.Tensor, torch.Tensor], *, epochs: int, lr: float, batch: int) -> float:
    """Train in place, in the order of the data; return the mean loss."""
    pictures, labels = data
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    net.train()
    total = 0.0
    for _ in range(epochs):
        for start in range(0, len(labels), batch):
            optimizer.zero_grad()
            targets = labels[start : start + batch]
            loss = nn.functional.cross_entropy(net(pictures[start : start + batch]), targets)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(targets)
    return total / (epochs * len(labels))


def test(net: Net, data: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, float]:
    """Return mean loss and accuracy."""
    pictures, labels = data
    net.eval()
    with torch.no_grad():
        outputs = net(pictures)
    loss = nn.functional.cross_entropy(outputs, labels).item()
    return loss, (outputs.argmax(1) == labels).float().mean().item()
