"""Clients of a prediction server, in a separate process: each sends its next request after the answer.

    python -m benchmarks.serving_load PORT PATH binary|json CLIENTS SECONDS

Prints JSON: requests, seconds, p50_ms, p99_ms, failed.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import numpy as np
import uvloop

WARM_UP_S = 0.5
INPUT = "input"
SHAPE = (1, 1, 28, 28)


def request(path: str, kind: str) -> bytes:
    """Return a request's bytes."""
    values = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    tensor = {"name": INPUT, "shape": list(SHAPE), "datatype": "FP32"}
    extra, data = "", b""
    if kind == "binary":
        data = values.tobytes()
        tensor["parameters"] = {"binary_data_size": len(data)}
        text = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
        extra = f"Inference-Header-Content-Length: {len(text)}\r\n"
    else:
        tensor["data"] = values.reshape(-1).tolist()
        text = json.dumps({"inputs": [tensor]}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{extra}Content-Length: {len(text) + len(data)}\r\n\r\n"
    return head.encode() + text + data


class Client(asyncio.Protocol):
    """One connection."""

    def __init__(self, message: bytes) -> None:
        self._message = message
        self._seen = bytearray()
        self._wanted = 0
        self.times: list[tuple[float, float]] = []  # end of a request, and how long it took
        self.failed = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # of a socket
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        self._start_s = time.perf_counter()
        self._transport.write(self._message)

    def data_received(self, data: bytes) -> None:
        self._seen += data
        if not self._wanted:
            end = self._seen.find(b"\r\n\r\n")
            if end < 0:
                return
            head = bytes(self._seen[:end]).lower()
            at = head.index(b"content-length:") + 15
            self._wanted = end + 4 + int(head[at:].split(b"\r\n", 1)[0])
            self.failed += not head.startswith(b"http/1.1 200")
        if len(self._seen) >= self._wanted:
            now_s = time.perf_counter()
            self.times.append((now_s, now_s - self._start_s))
            self._seen.clear()
            self._wanted = 0
            self._ask()


async def run(port: int, message: bytes, num_clients: int, seconds: float) -> dict[str, float]:
    """Send requests for `seconds` after the warm-up, and return the results."""
    loop = asyncio.get_running_loop()
    clients = [Client(message) for _ in range(num_clients)]
    for client in clients:
        await loop.create_connection(lambda client=client: client, "127.0.0.1", port)
    await asyncio.sleep(WARM_UP_S)
    start_s = time.perf_counter()
    await asyncio.sleep(seconds)
    end_s = time.perf_counter()
    took = sorted(took_s for client in clients for at_s, took_s in client.times if start_s <= at_s <= end_s)
    return {
        "requests": len(took),
        "seconds": end_s - start_s,
        "p50_ms": 1000 * took[len(took) // 2],
        "p99_ms": 1000 * took[int(0.99 * len(took))],
        "failed": sum(client.failed for client in clients),
    }


if __name__ == "__main__":
    port_text, path_text, kind_text, clients_text, seconds_text = sys.argv[1:]
    sent = request(path_text, kind_text)
    print(json.dumps(uvloop.run(run(int(port_text), sent, int(clients_text), float(seconds_text)))))
