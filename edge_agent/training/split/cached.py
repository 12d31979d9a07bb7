"""Training with a frozen device part: each sample's activations go up once, and the cloud trains on what it has kept.

A sample's activations never change, so the first epoch, and the first round, send them, and later ones name samples by
their positions alone: E epochs cost 1/E of the bytes, and no gradient returns. The cache is the device's own: a key is
the hash of a sample, and the cloud looks it up among what this device has sent for this job.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3

from edge_agent.training.split.link import SplitLink
from edge_agent.training.split.loop import DeviceLoop, DeviceRun, expect
from edgefl.errors import TaskError
from edgefl.offload import wire
from edgefl.offload.training.crossing import packed, packed_targets
from edgefl.offload.training.halves import MicroBatch
from edgefl.offload.training.layout import layout_of
from edgefl.offload.training.traced import input_values
from edgefl.protocols.split.messages import (
    KEY_BYTES,
    ActivationRows,
    Keep,
    Kept,
    Lacks,
    SampleStep,
    Stepped,
    Stored,
    Wanted,
)
from edgefl.training.structures import Structure, leaves, rows
from edgefl.trees.tensors import array_of

if TYPE_CHECKING:
    import torch

_LENGTH = struct.Struct("<I")
_SENT_TOGETHER = 32  # samples in one message, at most


class CachedLoop(DeviceLoop):
    """Runs a `DeviceRun` whose device part is frozen."""

    def __init__(self, run: DeviceRun) -> None:
        super().__init__(run)
        self._keys: np.ndarray[Any, Any] | None = None  # uint8 (N, KEY_BYTES)

    def _steps(self, link: SplitLink, window: int) -> None:
        run, total = self.run, len(self.run.order)
        self._fill(link, window)
        flight: deque[int] = deque()
        for step in range(self._step, total):
            while len(flight) >= window:
                self._land_step(link, flight)
            positions = run.order[step].cpu().numpy().astype("<i4")
            link.send(SampleStep(step=step), wire.encode({"positions": positions}, "fp32"))
            flight.append(step)
            if (step + 1) % run.config.split.checkpoint_steps == 0 and step + 1 < total:
                while flight:
                    self._land_step(link, flight)
                run.checkpoints.keep(step + 1, {})
                link.send(Keep(step=step + 1))
                expect(link.receive(), Kept)
        while flight:
            self._land_step(link, flight)

    def _land_step(self, link: SplitLink, flight: deque[int]) -> None:
        stepped: Stepped = expect(link.receive(), Stepped)
        self._losses[flight.popleft()] = stepped.loss
        self._step = stepped.step + 1

    def _fill(self, link: SplitLink, window: int) -> None:
        """Send the activations of the samples that the cloud lacks."""
        if self._keys is None:
            self._keys = self._all_keys()
        link.send(Wanted(), wire.encode({"keys": self._keys}, "fp32"))
        frame = link.receive()
        expect(frame, Lacks)
        lacking = wire.decode(frame.sections[0])["positions"] if frame.sections else np.empty(0, "<i4")
        flying = 0
        for positions, message, section in self._rows(lacking):
            while flying >= window:
                expect(link.receive(), Stored)
                flying -= 1
            link.send(message, wire.encode({"positions": positions}, "fp32"), section)
            flying += 1
        for _ in range(flying):
            expect(link.receive(), Stored)

    def _all_keys(self) -> np.ndarray[Any, Any]:
        import torch

        run, found = self.run, []
        every: Any = torch.arange(len(run.samples), device=run.samples.device)
        for batch in run.samples.batches(iter(every.split(_SENT_TOGETHER)), run.seed):
            found += [_key(batch.inputs, batch.targets, at) for at in range(len(batch))]
        return np.frombuffer(b"".join(found), np.uint8).reshape(-1, KEY_BYTES)

    def _rows(self, lacking: np.ndarray[Any, Any]) -> Iterator[tuple[np.ndarray[Any, Any], ActivationRows, bytes]]:
        import torch

        run = self.run
        size = min(_SENT_TOGETHER, -(-run.config.batch_size // run.config.split.micro_batches))
        chunks = [lacking[start : start + size] for start in range(0, len(lacking), size)]
        order = (torch.from_numpy(one.astype(np.int64)).to(run.samples.device) for one in chunks)
        for positions, batch in zip(chunks, run.samples.batches(order, run.seed), strict=True):
            parts = run.make_parts(batch.inputs)
            micro = MicroBatch(step=0, number=0, share=1.0)
            here = run.half.forward(parts, input_values(batch.inputs), micro, trains=False)
            values, _ = run.half.crossing(here)
            _refuse_joined(values, len(batch))
            message = ActivationRows(inputs=layout_of(batch.inputs), targets=layout_of(batch.targets))
            yield positions, message, b"".join(self._row(values, batch.targets, at) for at in range(len(batch)))

    def _row(self, values: dict[str, torch.Tensor], targets: Structure, at: int) -> bytes:
        """Return one sample's values and targets, each with its length before it."""
        here = slice(at, at + 1)
        parts = (
            packed({name: one[here] for name, one in values.items()}, self.run.config.split.wire),
            packed_targets(rows(targets, here)),
        )
        return b"".join(_LENGTH.pack(len(one)) + one for one in parts)


def _key(inputs: Structure, targets: Structure, at: int) -> bytes:
    hashing = blake3()
    for leaf in (*leaves(inputs), *leaves(targets)):
        hashing.update(f"{leaf.dtype}{tuple(leaf.shape[1:])}".encode())
        hashing.update(np.ascontiguousarray(array_of(leaf[at])).tobytes())
    return hashing.digest(KEY_BYTES)


def _refuse_joined(values: dict[str, torch.Tensor], num: int) -> None:
    joined: Sequence[str] = [name for name, one in values.items() if one.ndim == 0 or one.shape[0] != num]
    if joined:
        raise TaskError(
            f"{', '.join(joined):.300} crosses the cut and is of the batch, not of its samples; a frozen device part "
            "is kept sample by sample. Cut elsewhere, or set train.split.device_part='trained'"
        )
