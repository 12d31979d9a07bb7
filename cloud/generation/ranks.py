"""A tail on several processes, also of several machines, that torchrun starts: each has some of the blocks.

    torchrun --nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint HOST:29400 --max-restarts 100
      -m cloud.generation.ranks --folder large/tail [--join /run/edgefl/tail.sock]

The first process is one on the machine of `edgefl cloud generate --join /run/edgefl/tail.sock`, which has the same
option. It does what a tail's own process does (`tail_main`), and has the last norm and the output layer; hidden states
go through all processes' blocks in their order, and back to it. The sequences of a step are computed in as many groups
as there are processes, so that all of them work at the same time: the pipeline of GPipe (Huang et al. 2019).
A process that fails ends; torchrun starts all of them again, and devices send their sequences again.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
import os
import signal
import socket
import time
import weakref
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from cloud.generation.tail_main import Tail, engine_of, serve, tried
from cloud.generation.wire import TailUp, packed
from edgefl.errors import ConfigError, PartFailed
from edgefl.logs import event, set_up_logging
from edgefl.offload.generation.blocks import (
    HEAD,
    NORM,
    ROTARY,
    ArrayLibrary,
    DecoderPart,
    Rows,
    SequenceCache,
    tensors_of,
)
from edgefl.offload.generation.generate import weights_of
from edgefl.offload.generation.stage_info import StageInfo, read_stage
from edgefl.protocols.backoff import Backoff
from edgefl.trees import Array, SpooledTree, spec_of

FIRST_PAUSE_S = 0.5  # before the first process connects to its server again; then longer ones
STEADY_S = 30.0
_BEATS = 4  # messages to the other ranks within the time limit, also while there is nothing to do

_log = logging.getLogger(__name__)


def spans(start: int, end: int, ranks: int, head_blocks: float) -> list[tuple[int, int]]:
    """Return each rank's blocks, so that all have about as many bytes; the head is as large as `head_blocks` blocks.

    Raises ConfigError for fewer blocks than ranks behind the first.
    """
    num = end - start
    if num < ranks - 1 or ranks < 1:
        raise ConfigError(f"a tail of {num} blocks cannot be divided among {ranks} processes; use at most {num + 1}")
    first = num if ranks == 1 else min(num - ranks + 1, max(0, round((num + head_blocks) / ranks - head_blocks)))
    bounds = [start, *(start + first + (num - first) * rank // max(1, ranks - 1) for rank in range(ranks))]
    bounds[-1] = end
    return list(itertools.pairwise(bounds))


class Ring:
    """What ranks send each other, by torch.distributed: through memory, TCP (gloo) or a GPU's links (nccl)."""

    def __init__(self, engine: ArrayLibrary, width: int, *, leads: bool) -> None:
        """`leads`: this process may be the first. Raises ConfigError if none may."""
        import torch
        import torch.distributed as dist

        self._torch, self._dist = torch, dist
        self._engine, self._width = engine, width
        self.ranks, self._first = dist.get_world_size(), _first(leads=leads)
        self.rank = (dist.get_rank() - self._first) % self.ranks  # in the order of the blocks
        self._sent: list[tuple[Any, Any]] = []
        self._told = self._forth = self._back = None  # the groups; None = all processes, with the limit for loading

    def begin(self, limit: timedelta) -> None:
        """Wait until all processes have loaded their blocks; from now on `limit` is for each message.

        What comes back to the first process has a group of its own: with NCCL, the messages between two processes keep
        one order in both directions, and two processes would wait for each other.
        """
        self._dist.barrier()
        self._told, self._forth, self._back = (self._dist.new_group(timeout=limit) for _ in range(3))

    def tell(self, command: dict[str, Any]) -> None:
        """From the first process to all others."""
        data = np.frombuffer(json.dumps(command).encode(), np.uint8).copy()
        for part in (np.array([len(data)]), data):
            self._dist.broadcast(self._torch.from_numpy(part), src=self._first, group=self._told)

    def hear(self) -> dict[str, Any]:
        """Return what the first process tells."""
        size = self._torch.zeros(1, dtype=self._torch.int64)
        self._dist.broadcast(size, src=self._first, group=self._told)
        data = self._torch.empty(int(size), dtype=self._torch.uint8)
        self._dist.broadcast(data, src=self._first, group=self._told)
        command: dict[str, Any] = json.loads(data.numpy().tobytes())
        return command

    def send(self, hidden_ne: Any) -> None:
        """Begin to send hidden states (N, E) to the next rank; behind the last is the first."""
        whole = self._torch.from_numpy(np.ascontiguousarray(hidden_ne)) if self._engine.xp is np else hidden_ne
        group = self._back if self.rank == self.ranks - 1 else self._forth
        whole = whole.contiguous()
        self._sent.append((self._dist.isend(whole, self._peer(1), group=group), whole))

    def receive(self, num: int) -> Any:
        """Return hidden states (num, E) from the rank before; behind the first is the last."""
        hidden = self._torch.empty(num, self._width, device=self._engine.device or None)
        self._dist.recv(hidden, self._peer(-1), group=self._forth if self.rank else self._back)
        return hidden.numpy() if self._engine.xp is np else hidden

    def _peer(self, steps: int) -> int:
        """Return torch's rank of the process so many steps behind this one."""
        return (self._first + self.rank + steps) % self.ranks

    def wait_for_sent(self) -> None:
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()


def _first(*, leads: bool) -> int:
    """Return torch's rank of the first process: the lowest one that may lead."""
    import torch
    import torch.distributed as dist

    flags = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(flags, torch.tensor([int(leads)]))
    found = [rank for rank, flag in enumerate(flags) if int(flag)]
    if not found:
        raise ConfigError("no process has --join; give it on the machine where `edgefl cloud generate --join` runs")
    return found[0]


class RankedCache(SequenceCache):
    """The first rank's cache of one sequence; the other ranks know theirs by its key."""

    def __init__(self, engine: ArrayLibrary, info: StageInfo, key: int, room: int) -> None:
        super().__init__(engine, info)
        self.key, self.room = key, room
        self.make_room(room)


class RankedPart(DecoderPart):
    """A stage of which this process, the first, has some blocks and the end, and the other ranks have the rest."""

    def __init__(self, info: StageInfo, tensors: SpooledTree, engine: ArrayLibrary, ring: Ring) -> None:
        own = _span_of(info, tensors, ring)
        super().__init__(own, _tensors(tensors, own), engine)
        self._own, self.info, self._ring = own, info, ring
        ends = dataclasses.replace(info, start=info.end, tokenizer_digest="")
        self._end = DecoderPart(ends, _tensors(tensors, ends, NORM, HEAD), engine)
        self._keys = itertools.count(1)
        self._known: set[int] = set()  # sequences for which the others have caches
        self._dropped: list[int] = []

    def new_cache(self, room: int = 0) -> SequenceCache:
        cache = RankedCache(self.engine, self._own, next(self._keys), room)
        weakref.finalize(cache, self._dropped.append, cache.key)
        return cache

    def run(self, hidden_ne: Any, rows: Sequence[Rows]) -> Any:
        """Return hidden states behind the blocks of all ranks; raises PartFailed, after which all begin again."""
        groups = grouped(rows, self._ring.ranks)
        try:
            self._tell(groups)
            parts = self._through_all(hidden_ne, groups)
        except Exception as cause:
            raise PartFailed(f"a step through {self._ring.ranks} processes failed: {cause}") from cause
        return self.engine.xp.concatenate(parts) if len(parts) > 1 else parts[0]

    def _through_all(self, hidden_ne: Any, groups: Sequence[Sequence[Rows]]) -> list[Any]:
        at, parts = 0, []
        for group in groups:
            num = sum(one.num for one in group)
            made = super().run(hidden_ne[at : at + num], group)
            at += num
            if self._ring.ranks == 1:
                parts.append(made)
            else:
                self._ring.send(made)
        if self._ring.ranks > 1:
            parts = [self._ring.receive(sum(one.num for one in group)) for group in groups]
            self._ring.wait_for_sent()
        return parts

    def logits(self, hidden_ne: Any) -> Array:
        return self._end.logits(hidden_ne)

    def beat(self) -> None:
        """Tell the other ranks that there is nothing to do: they wait for a limited time only."""
        self._tell([])

    def _tell(self, groups: Sequence[Sequence[Rows]]) -> None:
        if self._ring.ranks == 1:
            self._dropped.clear()
            return
        dropped = [self._dropped.pop() for _ in range(len(self._dropped))]
        said = [[self._said(one) for one in group] for group in groups]
        self._known.difference_update(dropped)
        self._ring.tell({"groups": said, "drop": dropped})

    def _said(self, one: Rows) -> list[int]:
        """Return key and number of rows, and for a new sequence the room that its cache needs."""
        cache = one.cache
        if not isinstance(cache, RankedCache):
            raise TypeError("a cache of another part")
        is_new = cache.key not in self._known
        self._known.add(cache.key)
        return [cache.key, one.num, *([cache.room] if is_new else [])]


def follow(part: DecoderPart, ring: Ring) -> None:
    """Compute this process's blocks for the first one; when that is gone, an operation fails, and this one ends."""
    caches: dict[int, SequenceCache] = {}
    while True:
        command = ring.hear()
        for key in command["drop"]:
            caches.pop(key, None)
        for group in command["groups"]:
            rows = []
            for key, num, *room in group:
                if room:
                    caches[key] = part.new_cache(room[0])
                rows.append(Rows(caches[key], num))
            ring.send(part.run(ring.receive(sum(one.num for one in rows)), rows))
        ring.wait_for_sent()


def grouped(rows: Sequence[Rows], most: int) -> list[list[Rows]]:
    """Return consecutive groups, at most so many, with about as many rows each."""
    total, groups, done = sum(one.num for one in rows), [list[Rows]()], 0
    for one in rows:
        if groups[-1] and done + one.num / 2 > total * len(groups) / most:
            groups.append([])
        groups[-1].append(one)
        done += one.num
    return groups


def _span_of(info: StageInfo, tensors: SpooledTree, ring: Ring) -> StageInfo:
    """Return the record of this rank's blocks, without norm and head."""
    sizes = {name: one.num_bytes for name, one in spec_of(tensors).items()}
    ends = sum(sizes.get(name, 0) for name in (NORM, HEAD))
    block = (sum(sizes.values()) - ends) / max(1, info.end - info.start)
    start, end = spans(info.start, info.end, ring.ranks, ends / max(1.0, block))[ring.rank]
    return dataclasses.replace(info, start=start, end=end, tokenizer_digest="", tail_digest=info.digest)


def _tensors(tensors: SpooledTree, info: StageInfo, *ends: str) -> dict[str, Array]:
    names = [*tensors_of(tensors, info.start, info.end, first=False, last=False), ROTARY, *ends]
    return {name: tensors[name] for name in names}


def _lead(part: RankedPart, server: Path, limit_s: float) -> None:
    """Serve the server on this machine, and its next process when it has ended; never returns."""
    tried(part)
    pauses = Backoff(FIRST_PAUSE_S, limit_s / _BEATS)
    while True:
        begun_s = time.monotonic()
        with socket.socket(socket.AF_UNIX) as control:
            try:
                control.connect(str(server))
                control.sendall(packed(TailUp(pid=os.getpid(), digest=part.info.digest)))
                event(_log, logging.INFO, "ranks.connected", socket=server)
                serve(control, Tail(part), part.beat, limit_s / _BEATS)
                event(_log, logging.WARNING, "ranks.disconnected", socket=server)
            except OSError as error:
                event(_log, logging.WARNING, "ranks.wait", socket=server, reason=error)
        if time.monotonic() - begun_s > STEADY_S:
            pauses.reset()
        part.beat()
        time.sleep(pauses.next_s())  # its server starts again, or has not started yet


def main() -> None:
    """Run as one of torchrun's processes."""
    parser = argparse.ArgumentParser(prog="edgefl-ranks", description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="the tail; the same on each machine")
    parser.add_argument("--join", type=Path, help="the socket of `edgefl cloud generate --join`, on its machine")
    parser.add_argument("--engine", default="auto", help="auto, torch, torch:cuda or numpy")
    parser.add_argument("--load-s", type=float, default=1800.0, help="time limit until all processes are loaded")
    parser.add_argument("--run-s", type=float, default=60.0, help="time limit for what one waits for another")
    arguments = parser.parse_args()
    set_up_logging()
    import torch
    import torch.distributed as dist

    engine = engine_of(arguments.engine, len(os.sched_getaffinity(0)))
    if engine.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    info, tensors = read_stage(arguments.folder), weights_of(arguments.folder)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun ends its processes
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if engine.device == "cuda" else "gloo", timeout=timedelta(seconds=arguments.load_s)
    )
    ring, limit = Ring(engine, info.spec.hidden, leads=arguments.join is not None), timedelta(seconds=arguments.run_s)
    own = _span_of(info, tensors, ring)
    if ring.rank == 0:
        part: DecoderPart = RankedPart(info, tensors, engine, ring)
    else:
        part = DecoderPart(own, _tensors(tensors, own), engine)
    ring.begin(limit)
    event(_log, logging.INFO, "rank.up", rank=ring.rank, of=ring.ranks, blocks=f"{own.start}-{own.end}")
    if isinstance(part, RankedPart):
        _lead(part, arguments.join, arguments.run_s)
    else:
        follow(part, ring)


if __name__ == "__main__":
    main()
