"""An Ethernet switch in user space, whose links have a delay and a rate, lose frames and can be cut: its own process.

    python switch.py SEED NAME=TAP_DESCRIPTOR ...     the ports; one JSON object a line on stdin changes one of them

    {"port": "a", "delay_s": 0.02, "mbps": 5, "loss": 0.3, "cut": false}    answered by one byte, once it holds
    {"port": "a", "cut": true, "for_s": 1.5}                       then the port is as usual again

It does what netem does, on any kernel with TAP devices: many small kernels (of virtual machines, of CI runners) have
network namespaces, but no netem. A frame passes two links, that of its sender and that of its receiver; each delays it,
may lose it, and carries one frame after the other at its rate, in each direction. Losses are drawn from the seed.
It ends with the process that holds its stdin.
"""

from __future__ import annotations

import heapq
import itertools
import json
import os
import random
import selectors
import sys
import time
from dataclasses import dataclass, field
from typing import Any

MAX_FRAME_BYTES = 65_536
BURST = 64  # frames that are read from a port before the others have their turn
STDIN, STDOUT = 0, 1


@dataclass
class Port:
    """One end of a cable, and what the cable does to frames."""

    name: str
    descriptor: int
    delay_s: float = 0.0
    mbps: float = 0.0  # megabits/s of the link, in each direction; 0 = no limit
    loss: float = 0.0  # the probability that a frame is lost
    cut: bool = False
    usual: dict[str, Any] = field(default_factory=lambda: {"delay_s": 0.0, "mbps": 0.0, "loss": 0.0, "cut": False})
    free_s: dict[str, float] = field(default_factory=lambda: {"up": 0.0, "down": 0.0})  # when each direction is free

    def through_s(self, direction: str, now_s: float, num_bytes: int) -> float:
        """Return when a frame that comes now has left this link."""
        if not self.mbps:
            return now_s + self.delay_s
        self.free_s[direction] = max(now_s, self.free_s[direction]) + 8 * num_bytes / (self.mbps * 1e6)
        return self.free_s[direction] + self.delay_s


class Switch:
    """Forwards frames between its ports, by the addresses that it has learnt."""

    def __init__(self, ports: list[Port], seed: int) -> None:
        self._ports = {port.name: port for port in ports}
        self._random = random.Random(seed)  # noqa: S311 - frames that are lost
        self._at: dict[bytes, Port] = {}  # Ethernet address -> where it was seen
        self._numbers = itertools.count()  # frames that are due at the same time keep their order
        self._on_the_way: list[tuple[float, int, Port, bytes]] = []
        self._ends: list[tuple[float, int, Port, list[str]]] = []  # when what is as usual again
        self._selector = selectors.DefaultSelector()
        for port in ports:
            os.set_blocking(port.descriptor, False)
            self._selector.register(port.descriptor, selectors.EVENT_READ, port)
        self._selector.register(STDIN, selectors.EVENT_READ)
        self._said = b""

    def run(self) -> None:
        """Forward until stdin is closed."""
        while True:
            now_s = time.monotonic()
            due = [queue[0][0] for queue in (self._on_the_way, self._ends) if queue]
            wait_s = max(0.0, min(due) - now_s) if due else None
            for key, _ in self._selector.select(wait_s):
                if isinstance(key.data, Port):
                    self._read(key.data)
                elif not self._listen():
                    return
            now_s = time.monotonic()
            while self._ends and self._ends[0][0] <= now_s:
                _, _, port, names = heapq.heappop(self._ends)
                for name in names:
                    setattr(port, name, port.usual[name])
            while self._on_the_way and self._on_the_way[0][0] <= now_s:
                _, _, port, frame = heapq.heappop(self._on_the_way)
                if not port.cut:
                    _write(port, frame)

    def _listen(self) -> bool:
        said = os.read(STDIN, 65_536)
        *lines, self._said = (self._said + said).split(b"\n")
        for line in lines:
            wish = json.loads(line)
            port = self._ports[wish.pop("port")]
            for_s = wish.pop("for_s", None)
            if for_s is None:
                port.usual |= wish
            else:
                heapq.heappush(self._ends, (time.monotonic() + for_s, next(self._numbers), port, list(wish)))
            for name, value in wish.items():
                setattr(port, name, value)
            os.write(STDOUT, b".")
        return bool(said)

    def _read(self, port: Port) -> None:
        for _ in range(BURST):
            try:
                frame = os.read(port.descriptor, MAX_FRAME_BYTES)
            except BlockingIOError:
                return
            self._at[frame[6:12]] = port
            if not self._is_lost(port):
                there = self._at.get(frame[:6])
                for other in [there] if there else [one for one in self._ports.values() if one is not port]:
                    self._send(port, other, frame)

    def _send(self, start: Port, end: Port, frame: bytes) -> None:
        if end is not start and not self._is_lost(end):
            sent_s = start.through_s("up", time.monotonic(), len(frame))
            due_s = end.through_s("down", sent_s, len(frame))
            heapq.heappush(self._on_the_way, (due_s, next(self._numbers), end, frame))

    def _is_lost(self, port: Port) -> bool:
        return port.cut or self._random.random() < port.loss


def _write(port: Port, frame: bytes) -> None:
    try:
        os.write(port.descriptor, frame)
    except OSError:  # the machine's queue is full, or the machine is gone: the frame is lost, as on a cable
        return


def main() -> None:
    seed, *named = sys.argv[1:]
    ports = [Port(name, int(descriptor)) for name, _, descriptor in (one.partition("=") for one in named)]
    Switch(ports, int(seed)).run()


if __name__ == "__main__":
    main()
