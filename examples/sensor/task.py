"""Is a bearing worn? A 1-D convolution over vibration and the shaft's speed, read as they are needed.

A good machine hums at its shaft's speed, a loose foot knocks at twice the speed, a worn bearing rattles at 3.6 times
the speed. So the vibration alone does not tell: the model has two inputs, as a dict. Recordings of a machine are many
and large, so the loaders return a Dataset, of which only the batch at work is in memory. Here a recording is computed
from its number; yours reads a file.

Each device is a machine with a noise and a loudness of its own. The operator's held-out recordings are of machines that
no device has; each device also holds out some of its own (`eval_data`), and reports how well the model does there:

    edgefl agent start --data part=0 --data parts=3
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from edgefl import Task

STATES = ("good", "loose foot", "worn bearing")
TONES = (1.0, 2.0, 3.6)  # times the shaft's speed
NUM_AXES, LENGTH, RATE_HZ = 3, 256, 512
NUM_RECORDINGS, NUM_OWN_HELD_OUT, NUM_UNSEEN_MACHINES = 400, 60, 4
Sample = tuple[dict[str, np.ndarray], int]


class Recordings(Dataset[Sample]):
    """Recordings of one machine: {vibration (3, 256), speed (1,)} and the number of its state."""

    def __init__(self, machine: int, first: int, count: int) -> None:
        self._machine, self._first, self._count = machine, first, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        own = np.random.default_rng([self._machine, 0])
        loudness, noise = own.uniform(0.5, 2.0), own.uniform(0.1, 0.3)
        random = np.random.default_rng([self._machine, 1 + self._first + index])
        state, speed_hz = int(random.integers(len(STATES))), random.uniform(10, 50)
        turns = speed_hz * (np.arange(LENGTH) / RATE_HZ + random.uniform(0, 1, size=(NUM_AXES, 1)))
        signal = np.sin(2 * np.pi * TONES[state] * turns) + random.normal(scale=noise, size=turns.shape)
        vibration = (loudness * signal).astype(np.float32)
        return {"vibration": vibration, "speed": np.array([speed_hz / 50], np.float32)}, state


class Joined(Dataset[Sample]):
    """The recordings of several machines, one after another."""

    def __init__(self, parts: list[Recordings]) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def __getitem__(self, index: int) -> Sample:
        each = len(self._parts[0])
        return self._parts[index // each][index % each]


def load_part(part: str = "0", parts: str = "1") -> Recordings:
    """Return the recordings that this device trains on."""
    return Recordings(_machine(part, parts), 0, NUM_RECORDINGS)


def load_own_held_out(part: str = "0", parts: str = "1") -> Recordings:
    """Return the recordings of this device on which it does not train."""
    return Recordings(_machine(part, parts), NUM_RECORDINGS, NUM_OWN_HELD_OUT)


def load_held_out() -> Joined:
    """Return recordings of machines that no device has."""
    return Joined([Recordings(10**6 + one, 0, NUM_OWN_HELD_OUT) for one in range(NUM_UNSEEN_MACHINES)])


def _machine(part: str, parts: str) -> int:
    if not 0 <= int(part) < int(parts):
        message = f"part={part} must be in 0..{int(parts) - 1} (parts={parts})"
        raise ValueError(message)
    return int(part)


class Net(nn.Module):
    """Two convolutions over the vibration; the speed joins before the last layers."""

    def __init__(self) -> None:
        super().__init__()
        self.listen = nn.Sequential(
            nn.Conv1d(NUM_AXES, 32, 31, stride=4, padding=15),
            nn.ReLU(),
            nn.Conv1d(32, 32, 5, stride=2, padding=2),
            nn.ReLU(),
        )
        self.decide = nn.Sequential(nn.Linear(65, 64), nn.ReLU(), nn.Linear(64, len(STATES)))

    def forward(self, vibration: torch.Tensor, speed: torch.Tensor) -> torch.Tensor:
        """(N, axes, 256) and (N, 1) to scores (N, states)."""
        loudness = vibration.square().mean((1, 2), keepdim=True).sqrt()
        heard = self.listen(vibration / (loudness + 1e-6))
        return self.decide(torch.cat([heard.mean(2), heard.amax(2), speed.log()], 1))


def make_optimizer(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Make a device's optimizer for one round, with `train.lr` of the configuration."""
    return torch.optim.Adam(parameters, lr=lr)


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Return the fraction of recordings whose state is found."""
    return (outputs.argmax(1) == targets).float().mean().item()


task = Task(
    name="bearings",
    model=Net,
    loss=nn.functional.cross_entropy,
    optimizer=make_optimizer,
    train_data=load_part,
    eval_data=load_own_held_out,
    test_data=load_held_out,
    metrics={"accuracy": accuracy},
)
