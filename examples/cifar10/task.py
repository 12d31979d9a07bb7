"""CIFAR-10: 60,000 colour pictures of 32x32 pixels in 10 classes.

The pictures come from parquet files in Hugging Face's layout (a column `img` with the bytes of each
picture, a column `label`), or from a `datasets` name. A device says which part is its own:

    edgefl agent start --data path=/data/cifar10 --data part=0 --data parts=10 --data skew=0.5

Only the pictures of that part are decoded, once in the life of a process.
"""

import io
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgefl import Task

CUT_SEED = 10
NAME = "uoft-cs/cifar10"  # in the `datasets` library
MEAN = np.array([0.4914, 0.4822, 0.4465], np.float32).reshape(3, 1, 1)  # of the training pictures, by channel
STD = np.array([0.2470, 0.2435, 0.2616], np.float32).reshape(3, 1, 1)


def read_split(split: str, path: str, dataset: str) -> tuple[Sequence[Any], np.ndarray]:
    """Return the encoded pictures and the labels of "train" or "test"."""
    path = path or ("" if dataset else os.environ.get("CIFAR10_PATH", ""))
    if path:
        return _read_parquet(split, Path(path).expanduser())
    try:
        from datasets import Image, load_dataset
    except ImportError as cause:
        message = (
            "there is no path to CIFAR-10's parquet files, and the `datasets` library is not installed: give "
            "`--data path=FOLDER`, or set CIFAR10_PATH, or `pip install datasets` to have it downloaded"
        )
        raise ImportError(message) from cause
    table = load_dataset(dataset or NAME, split=split).cast_column("img", Image(decode=False))
    return [picture["bytes"] for picture in table["img"]], np.asarray(table["label"], np.int64)


def _read_parquet(split: str, path: Path) -> tuple[Sequence[Any], np.ndarray]:
    import pyarrow.parquet

    files = [path] if path.is_file() else sorted(path.rglob(f"{split}*.parquet"))
    if not files:
        message = f"there is no {split}*.parquet below {path.absolute()}"
        raise FileNotFoundError(message)
    tables = [pyarrow.parquet.read_table(file, columns=["img", "label"]) for file in files]
    pictures = [cell["bytes"] for table in tables for cell in table["img"]]
    return pictures, np.concatenate([table["label"].to_numpy() for table in tables]).astype(np.int64)


def split_by_label(labels: np.ndarray, parts: int, skew: float) -> list[np.ndarray]:
    """Split the indices of `labels` into parts: a fraction `skew` sorted by label, the rest at random."""
    order = np.random.default_rng(CUT_SEED).permutation(len(labels))
    sorted_share, mixed = np.split(order, [round(skew * len(order))])
    sorted_share = sorted_share[np.argsort(labels[sorted_share], kind="stable")]
    pairs = zip(np.array_split(sorted_share, parts), np.array_split(mixed, parts), strict=True)
    return [np.concatenate(pair) for pair in pairs]


def decode(pictures: Sequence[Any], chosen: np.ndarray) -> np.ndarray:
    """Return the chosen pictures, normalised, as float32 (N, 3, 32, 32)."""
    from PIL import Image

    def read(index: int) -> np.ndarray:
        data = pictures[index]
        with Image.open(io.BytesIO(data if isinstance(data, bytes) else data.as_py())) as picture:
            return np.asarray(picture.convert("RGB"))

    stacked = np.stack([read(index) for index in chosen]).transpose(0, 3, 1, 2)
    return (stacked.astype(np.float32) / 255 - MEAN) / STD


@lru_cache(maxsize=2)  # decoded once, not in every round
def load_part(
    part: str = "0", parts: str = "1", skew: str = "0.5", limit: str = "", path: str = "", dataset: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """Return this device's own pictures and labels, at most `limit` of them."""
    if not 0 <= int(part) < int(parts) or not 0 <= float(skew) <= 1:
        message = f"part={part} must be in 0..{int(parts) - 1} (parts={parts}), and skew={skew} in 0..1"
        raise ValueError(message)
    pictures, labels = read_split("train", path, dataset)
    chosen = split_by_label(labels, int(parts), float(skew))[int(part)]
    return _take(pictures, labels, np.random.default_rng(CUT_SEED).permutation(chosen), limit)


@lru_cache(maxsize=1)
def load_held_out(limit: str = "", path: str = "", dataset: str = "") -> tuple[np.ndarray, np.ndarray]:
    """Return the test pictures and labels."""
    pictures, labels = read_split("test", path, dataset)
    return _take(pictures, labels, np.arange(len(labels)), limit)


def _take(pictures: Sequence[Any], labels: np.ndarray, chosen: np.ndarray, limit: str) -> tuple[np.ndarray, np.ndarray]:
    chosen = chosen[: int(limit)] if limit else chosen
    return decode(pictures, chosen), labels[chosen]


def make_model() -> nn.Module:
    """A CNN of three convolutions: 122,570 parameters."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Return the fraction of samples whose largest output is the right one."""
    return (outputs.argmax(1) == targets).float().mean().item()


task = Task(
    name="cifar10",
    model=make_model,
    loss=nn.functional.cross_entropy,
    train_data=load_part,
    test_data=load_held_out,
    metrics={"accuracy": accuracy},
)
