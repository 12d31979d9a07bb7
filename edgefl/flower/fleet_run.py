"""Run a Flower app on a fleet: its ServerApp in this thread, its ClientApps in the trainers of real devices.

Invariant: however the ServerApp ends, by itself, by what it raises or by Ctrl-C, the relay ends with it.
"""

from __future__ import annotations

import hashlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from edgefl.bundle import pack_located
from edgefl.errors import JobCancelled, TaskError
from edgefl.flower.app import KIND, FlowerApp, RunConfigValue, client_reference, fuse_run_config, require_flower
from edgefl.flower.run import FlowerRunResult, Json, result_of, serving, took_part
from edgefl.operator.client import CloudClient
from edgefl.operator.relay import Relay
from edgefl.task import Located, UserCode
from edgefl.trees import write_tree

if TYPE_CHECKING:
    from flwr.app import ArrayRecord


def run_on_fleet(
    app: FlowerApp, client: Callable[[], CloudClient], run_config: Mapping[str, RunConfigValue] | None = None, *,
    on_start: Callable[[str, int], None] | None = None, on_round: Callable[[Json], None] | None = None,
    out: Path | None = None,
) -> FlowerRunResult:  # fmt: skip
    """Run an app's ServerApp to its end, with the devices that are online as its nodes.

    `client` opens a connection to the cloud; `run_config` overrides the app's; `on_start` hears the relay's id and
    how many devices are online, `on_round` of each round; `out` is where the last strategy's arrays go
    (safetensors). Ctrl-C ends the run with the rounds that there are. Raises ConfigError, TaskError where the
    ServerApp raises, QuorumNotMet where all training failed, JobCancelled and JobFailed where the relay ended.
    """
    require_flower("a Flower app")
    from flwr.app import Context, RecordDict

    from edgefl.flower.fleet_grid import Devices, FleetGrid
    from edgefl.flower.watch import Watch

    config = fuse_run_config(app, run_config or {})
    reference = client_reference(app.folder)
    packed = pack_located(Located(reference, app.folder), str(app.folder))
    with client() as uploading:
        bundle = uploading.put_blob(packed.data, hashlib.sha256(packed.data).hexdigest())
    interrupted = False
    with ExitStack() as stack:
        relay = stack.enter_context(Relay(client, reference, bundle))
        devices = Devices(relay)
        watch = Watch(time.monotonic, on_round, devices.name)
        run_id = int(relay.id.rpartition("-")[2], 16)
        grid = FleetGrid(run_id, relay, devices, config, watch)
        stack.callback(grid.close)
        if on_start is not None:
            on_start(relay.id, len(devices.online()))
        context = Context(run_id=run_id, node_id=0, node_config={}, state=RecordDict(), run_config=dict(config))
        heard = stack.enter_context(serving(run_id))
        start_s = time.monotonic()
        try:
            with _stopped_by_interrupt(relay), UserCode(app.name, "its ServerApp", KIND):
                app.server_app(grid, context)
        except KeyboardInterrupt:
            interrupted = True
        except TaskError:
            if relay.fault is not None:  # what the ServerApp met with, and could do nothing about
                raise relay.fault from None
            raise
        if relay.fault is not None and not interrupted:  # the legacy server counts what it raises as failures
            raise relay.fault
        watch.finish()
        seconds = time.monotonic() - start_s
        positions = devices.positions()
        result = result_of(app, watch, heard, took_part(watch, len(positions), positions.__getitem__))
    model = None if out is None or result.arrays is None else _write(result.arrays, out)
    return replace(
        result, engine="fleet", job=relay.id, seconds=seconds, state=context.state, model=model, interrupted=interrupted
    )


@contextmanager
def _stopped_by_interrupt(relay: Relay) -> Iterator[None]:
    """Let Ctrl-C free whoever waits for a reply, in any thread, and then end the main one as ever."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        relay.stop(JobCancelled("interrupted where it was run"))
        signal.default_int_handler(number, frame)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _write(arrays: ArrayRecord, out: Path) -> Json:
    from edgefl.flower.records import tree_of

    with out.open("wb") as file:
        write_tree(tree_of(arrays), file)
    return {"sha256": hashlib.sha256(out.read_bytes()).hexdigest(), "path": str(out)}
