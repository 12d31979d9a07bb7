"""Predictions over HTTP, compared with a bare ASGI app and MLServer: the same int8 CNN and clients, in turn.

edgefl's is the real serving process, as an agent starts it. The bare app (`benchmarks.serving_bare`) only
computes, on the same HTTP server and event loop. Clients run in a separate process.

    python -m benchmarks.serving [--quick] [--json F]
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks import serving_mlserver, serving_model
from benchmarks.family import Family
from benchmarks.report import Row, Target, command, installed, median
from benchmarks.workload import RunFailedError
from edge_agent.releases.model_file import ModelFile
from edge_agent.serving.api import bind
from edge_agent.serving.supervisor import ServingCallbacks, ServingConfig, ServingSupervisor
from edgefl.local_fleet import free_ports

ROOT = Path(__file__).parents[1]
START_S = 60.0
PATH = "/v2/models/cnn/infer"
MLSERVER = "mlserver"


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """The kind of requests, the number of clients, and the target."""

    kind: str  # binary or json
    clients: int
    metric: str  # p50 or requests/s
    targets: tuple[Target, ...]

    def __str__(self) -> str:
        return f"int8 CNN 692k, {self.kind}, {self.clients} client{'s' if self.clients > 1 else ''}"


CASES = (
    Case(kind="binary", clients=1, metric="p50", targets=(Target(of="ours", at_most=0.25),)),
    Case(kind="binary", clients=8, metric="requests/s", targets=(Target(of="ratio", at_least=0.8),)),
    Case(kind="json", clients=1, metric="p50", targets=()),
    Case(kind="json", clients=8, metric="requests/s", targets=(Target(of="ours", at_least=4000),)),
)


def measure(*, quick: bool) -> Iterator[Row]:
    """Measure every case, all systems in turn."""
    seconds, repeats = (1.0, 3) if quick else (3.0, 7)
    with tempfile.TemporaryDirectory(prefix="serving-") as temporary:
        folder = Path(temporary)
        with Family(folder, {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}) as family:
            yield from asyncio.run(_measure(family, serving_model.build(folder), seconds, repeats))


async def _measure(family: Family, model: Path, seconds: float, repeats: int) -> list[Row]:
    rows = []
    async with _ours(model) as our_port:
        bare, mlserver = f"bare uvicorn {installed('uvicorn')}", MLSERVER
        ports = {bare: free_ports(1)[0]}
        family.start("bare", [sys.executable, "-m", "benchmarks.serving_bare", str(model), str(ports[bare])])
        if (version := serving_mlserver.version()) is not None:
            mlserver += f" {version}"
            ports[mlserver], *others = free_ports(3)
            command = serving_mlserver.write_server(family.folder / MLSERVER, model, ports[mlserver], *others)
            family.start(MLSERVER, command)
        for port in ports.values():
            await _answers(port)
        for case in CASES:
            taking_part = {name: port for name, port in ports.items() if name == bare or case.kind == "json"}
            ours: list[dict[str, float]] = []
            theirs: dict[str, list[dict[str, float]]] = {name: [] for name in taking_part}
            for _ in range(repeats):
                ours.append(await _load(our_port, case, seconds))
                for name, port in taking_part.items():
                    theirs[name].append(await _load(port, case, seconds))
            rows += [_row(case, name, ours, found) for name, found in theirs.items()]
            if mlserver not in theirs:
                rows.append(_skipped(case, mlserver, ours))
    return rows


def _row(case: Case, rival: str, ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> Row:
    return Row(
        workload=str(case), metric=case.metric, unit=_unit(case),
        ours=median(_values(case, ours)), rival=rival, theirs=median(_values(case, theirs)), targets=case.targets,
        more_is_better=case.metric != "p50", detail={"ours": ours, "theirs": theirs},
    )  # fmt: skip


def _values(case: Case, samples: list[dict[str, float]]) -> list[float]:
    if case.metric == "p50":
        return [one["p50_ms"] for one in samples]
    return [one["requests"] / one["seconds"] for one in samples]


def _skipped(case: Case, mlserver: str, ours: list[dict[str, float]]) -> Row:
    reason = (
        "it has no binary tensors over HTTP"
        if case.kind == "binary"
        else f"not in {serving_mlserver.PYTHON.parents[1]}; `make bench` installs it"
    )
    return Row(
        workload=str(case), metric=case.metric, unit=_unit(case), ours=median(_values(case, ours)), rival=mlserver,
        skipped=reason, more_is_better=case.metric != "p50",
    )  # fmt: skip


def _unit(case: Case) -> str:
    return "ms" if case.metric == "p50" else "1/s"


@contextlib.asynccontextmanager
async def _ours(model: Path) -> AsyncIterator[int]:
    listener = bind("127.0.0.1", 0)
    port: int = listener.getsockname()[1]
    callbacks = ServingCallbacks(serving=lambda _serving: None, failing=lambda _model, _reason: None)
    supervisor = ServingSupervisor(listener, ServingConfig(memory_mb=0, load_s=START_S), callbacks)
    running = asyncio.create_task(supervisor.run())
    try:
        (await supervisor.prepare(ModelFile(name="cnn", version=1, path=model), trial=True)).switch()
        yield port
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def _answers(port: int) -> None:
    deadline_s = time.monotonic() + START_S
    async with httpx.AsyncClient(trust_env=False) as client:
        while True:
            try:
                await client.get(f"http://127.0.0.1:{port}/")
            except httpx.ConnectError as cause:
                if time.monotonic() > deadline_s:
                    raise RunFailedError(f"nothing answers on port {port} after {START_S:g} s") from cause
                await asyncio.sleep(0.1)
            else:
                return


async def _load(port: int, case: Case, seconds: float) -> dict[str, float]:
    words = (str(port), PATH, case.kind, str(case.clients), str(seconds))
    clients = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.serving_load", *words, stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    said, _ = await clients.communicate()
    found: dict[str, float] = json.loads(said or b"{}")
    if clients.returncode or found.get("failed"):
        raise RunFailedError(f"{case}: the clients ended with {clients.returncode}, {found}")
    return found


main = command(measure, __doc__)

if __name__ == "__main__":
    main()
