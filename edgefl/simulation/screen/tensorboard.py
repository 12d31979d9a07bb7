"""Rounds as TensorBoard event files: one folder per run, one scalar per round and figure.

Tags: each metric by its name, clients/admitted .., bytes/up, bytes/down, seconds, virtual_seconds; the step is the
round, so that `tensorboard --logdir DIR` compares runs. The step of `devices/..` is the round before, whose parameters
the devices evaluated; that of the last parameters is the last round.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from edgefl.errors import ConfigError, MissingExtra
from edgefl.guards import DEVICES
from edgefl.records import RoundReport

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_CLIENTS = ("admitted", "rejected", "failed", "missing")
_NOT_IN_NAMES = re.compile(r"[^\w.,=+-]+")


def require_tensorboard() -> None:
    """Raise MissingExtra before the rounds if tensorboard is not installed."""
    try:
        import tensorboard  # noqa: F401 - to see that it is there
    except ImportError as cause:
        raise MissingExtra("--tensorboard", "tensorboard") from cause


class EventFile:
    """An event file that is made with its first round."""

    def __init__(self, folder: Path, closing: ExitStack) -> None:
        self._folder, self._closing = folder, closing
        self._writer: SummaryWriter | None = None
        self._last = 0

    def write(self, outcome: RoundReport) -> None:
        """Write a round; what the folder has of it and later ones is dropped."""
        if self._writer is None:
            self._writer = self._closing.enter_context(_writer(self._folder, outcome.round))
        self._last = outcome.round
        for tag, value in scalars(outcome).items():
            self._writer.add_scalar(tag, value, outcome.round - tag.startswith(DEVICES))
        self._writer.flush()

    def write_last(self, metrics: Mapping[str, float]) -> None:
        """Write what devices evaluated of the last parameters, after the last round."""
        if self._writer is None:
            return
        for tag, value in metrics.items():
            self._writer.add_scalar(tag, value, self._last)
        self._writer.flush()


@contextmanager
def event_file(folder: Path) -> Iterator[EventFile]:
    """Yield a new event file in the folder; the older values of its rounds are dropped.

    Raises ConfigError if the folder cannot be created.
    """
    require_tensorboard()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise ConfigError(f"cannot write --tensorboard {folder}: {cause.strerror}") from cause
    with ExitStack() as stack:
        yield EventFile(folder, stack)


@contextmanager
def _writer(folder: Path, first_round: int) -> Iterator[SummaryWriter]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=first_round if first_round > 1 else None)
    try:
        yield writer
    finally:
        writer.close()


def run_folder(folder: Path, variant: str) -> Path:
    """Return the folder for one variant of a sweep: TensorBoard names a run after its folder."""
    return folder / _NOT_IN_NAMES.sub("_", variant)


def scalars(outcome: RoundReport) -> Mapping[str, float]:
    """Return a round's figures by tag."""
    figures = {f"clients/{name}": getattr(outcome, name) for name in _CLIENTS}
    figures |= {"bytes/up": outcome.up_bytes, "bytes/down": outcome.down_bytes, "seconds": outcome.seconds}
    if outcome.virtual_end_s is not None:
        figures["virtual_seconds"] = outcome.virtual_end_s
    return {**outcome.metrics, **figures}
