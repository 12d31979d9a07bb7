"""The workloads of `benchmarks.simulation`: models, data and clients.

A partition depends on the client's number alone; cohorts, sample order and initial weights are edgefl's
own and given to all: `select_clients`, the permutation of `train_epochs`, `initial_parameters`.
Invariant: here is all that a contestant may know of the work; each brings only its engine.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgefl import JobConfig, Task
from edgefl.config import RoundsConfig, TrainConfig

SEED = 20
DIGITS_HELD_OUT = 360  # of 1,797
MNIST_HELD_OUT = 2000  # of 10,000
CIFAR_HELD_OUT = 2000  # of 10,000
CIFAR_CLIENTS = 1000
DATA_VARIABLE = "EDGEFL_BENCHMARK_DATA"  # a folder with cifar10/ and mnist10k.npz
DECODED_VARIABLE = "EDGEFL_BENCHMARK_CIFAR"  # a folder with CIFAR-10 as `decode_cifar` writes it
_MEAN = np.array([0.4914, 0.4822, 0.4465], np.float32).reshape(3, 1, 1)
_STD = np.array([0.2470, 0.2435, 0.2616], np.float32).reshape(3, 1, 1)

Pair = tuple[np.ndarray, np.ndarray]  # inputs and labels


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """One task, and how it is trained."""

    name: str
    about: str
    task: Task
    attribute: str  # name of the task in this module
    clients: int
    cohort: int  # clients per round
    samples: int  # per client
    batch: int
    lr: float
    rounds: int  # including the first, which rates do not count; enough to make worker processes worthwhile
    quick_rounds: int
    needs: str = ""  # required file or folder in the data folder

    @property
    def reference(self) -> str:
        return f"benchmarks.simulation_workloads:{self.attribute}"

    def config(self, rounds: int) -> JobConfig:
        return JobConfig(
            rounds=RoundsConfig(count=rounds, clients=self.cohort),
            train=TrainConfig(epochs=1, batch_size=self.batch, lr=self.lr),
        )

    def missing(self) -> str | None:
        """Return which data is missing, if any."""
        if not self.needs or (data_folder() / self.needs).exists():
            return None
        return f"there is no {self.needs} in the data folder; set {DATA_VARIABLE} to one that has it"


def data_folder() -> Path:
    """Return the folder of data that no package contains: from the variable, else shared/data next to the project."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get(DATA_VARIABLE) or beside)


@cache
def _digits() -> Pair:
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(SEED).permutation(len(digits.target))
    return (digits.images[order, None] / 16).astype(np.float32), digits.target[order].astype(np.int64)


@cache
def _mnist() -> Pair:
    with np.load(data_folder() / "mnist10k.npz") as file:
        images, labels = file["images"], file["labels"]
    order = np.random.default_rng(SEED).permutation(len(labels))
    return (images[order].reshape(len(labels), -1) / 255).astype(np.float32), labels[order].astype(np.int64)


def _drawn(everything: Callable[[], Pair], held_out: int, samples: int, part: str) -> Pair:
    """Draw a client's samples with replacement; without a part, return all that are not held out."""
    inputs, labels = (array[held_out:] for array in everything())
    if not part:
        return inputs, labels
    chosen = np.random.default_rng([SEED, int(part)]).integers(len(labels), size=samples)
    return inputs[chosen], labels[chosen]


def digits_part(part: str = "", parts: str = "") -> Pair:  # noqa: ARG001 - any number of clients draws alike
    return _drawn(_digits, DIGITS_HELD_OUT, 48, part)


def digits_held_out() -> Pair:
    inputs, labels = _digits()
    return inputs[:DIGITS_HELD_OUT], labels[:DIGITS_HELD_OUT]


def mnist_part(part: str = "", parts: str = "") -> Pair:  # noqa: ARG001 - any number of clients draws alike
    return _drawn(_mnist, MNIST_HELD_OUT, 60, part)


def mnist_held_out() -> Pair:
    inputs, labels = _mnist()
    return inputs[:MNIST_HELD_OUT], labels[:MNIST_HELD_OUT]


def cifar_part(part: str = "", parts: str = "") -> Pair:  # noqa: ARG001 - there are as many as samples allow
    """Return fifty pictures of this client alone."""
    images, labels = _cifar("train")
    order = _cifar_order(len(labels))
    chosen = np.sort(np.array_split(order, CIFAR_CLIENTS)[int(part or 0)])
    return _normalised(images[chosen]), np.array(labels[chosen])


def cifar_held_out() -> Pair:
    images, labels = _cifar("test")
    return _normalised(images[:CIFAR_HELD_OUT]), np.array(labels[:CIFAR_HELD_OUT])


@cache
def _cifar_order(num_samples: int) -> np.ndarray:
    return np.random.default_rng(SEED).permutation(num_samples)


@cache
def _cifar(split: str) -> Pair:
    folder = Path(os.environ[DECODED_VARIABLE])
    return np.load(folder / f"{split}-images.npy", mmap_mode="r"), np.load(folder / f"{split}-labels.npy")


def _normalised(images: np.ndarray) -> np.ndarray:
    return (images.astype(np.float32) / 255 - _MEAN) / _STD


def decode_cifar(folder: Path) -> None:
    """Write the pictures as arrays (N, 3, 32, 32) of bytes, once for all systems."""
    import pyarrow.parquet
    from PIL import Image

    for split in ("train", "test"):
        table = pyarrow.parquet.read_table(data_folder() / "cifar10" / f"{split}.parquet", columns=["img", "label"])
        pictures = [np.asarray(Image.open(io.BytesIO(cell["bytes"]))) for cell in table["img"].to_pylist()]
        np.save(folder / f"{split}-images.npy", np.stack(pictures).transpose(0, 3, 1, 2))
        np.save(folder / f"{split}-labels.npy", table["label"].to_numpy().astype(np.int64))


def make_cnn() -> nn.Module:
    """101,626 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 4 * 4, 80), nn.ReLU(), nn.Linear(80, 10),
    )  # fmt: skip


def make_mlp() -> nn.Module:
    """104,842 parameters."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 288), nn.ReLU(), nn.Linear(288, 288), nn.ReLU(), nn.Linear(288, 10)
    )


def make_digits_lr() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def make_mnist_lr() -> nn.Module:
    return nn.Linear(784, 10)


def make_cifar_cnn() -> nn.Module:
    """1,626,442 parameters: the CNN of pfl-research's own CIFAR-10 benchmark."""
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25),
        nn.Flatten(), nn.Linear(64 * 14 * 14, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.xavier_uniform_(module.weight)
    return model


def _accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    return (outputs.argmax(1) == targets).float().mean().item()


def _task(name: str, model: Callable[[], nn.Module], part: Callable[..., Pair], held_out: Callable[[], Pair]) -> Task:
    return Task(
        name=name,
        model=model,
        loss=nn.functional.cross_entropy,
        train_data=part,
        test_data=held_out,
        metrics={"accuracy": _accuracy},
    )


digits_cnn = _task("digits-cnn", make_cnn, digits_part, digits_held_out)
digits_mlp = _task("digits-mlp", make_mlp, digits_part, digits_held_out)
digits_lr = _task("digits-lr", make_digits_lr, digits_part, digits_held_out)
cifar_cnn = _task("cifar-cnn", make_cifar_cnn, cifar_part, cifar_held_out)
mnist_lr = _task("mnist-lr", make_mnist_lr, mnist_part, mnist_held_out)

_DIGITS = {"clients": 1000, "cohort": 100, "samples": 48, "batch": 16, "lr": 0.1}
WORKLOADS = {
    one.name: one
    for one in (
        Workload(
            name="digits-cnn", about="digits, 1000/100, CNN 102k", task=digits_cnn, attribute="digits_cnn",
            rounds=16, quick_rounds=3, **_DIGITS,
        ),
        Workload(
            name="digits-mlp", about="digits, 1000/100, MLP 105k", task=digits_mlp, attribute="digits_mlp",
            rounds=61, quick_rounds=4, **_DIGITS,
        ),
        Workload(
            name="digits-lr", about="digits, 1000/100, logistic regression", task=digits_lr, attribute="digits_lr",
            rounds=21, quick_rounds=4, **_DIGITS,
        ),
        Workload(
            name="cifar", about="CIFAR-10, 1000/50, CNN 1.6M", task=cifar_cnn, attribute="cifar_cnn",
            clients=CIFAR_CLIENTS, cohort=50, samples=50, batch=10, lr=0.1, rounds=5, quick_rounds=2, needs="cifar10",
        ),
        Workload(
            name="mnist-lr", about="MNIST, 1000/10, logistic regression", task=mnist_lr, attribute="mnist_lr",
            clients=1000, cohort=10, samples=60, batch=10, lr=0.03, rounds=100, quick_rounds=20,
            needs="mnist10k.npz",
        ),
    )
}  # fmt: skip
