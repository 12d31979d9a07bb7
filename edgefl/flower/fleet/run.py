"""Run a Flower app on a fleet: its ServerApp in this thread, its ClientApps in the trainers of real devices.

Invariant: when the ServerApp ends, normally, by an exception or by Ctrl-C, the relay ends, too.
"""

from __future__ import annotations

import hashlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

from edgefl.bundle import pack_located
from edgefl.bundle.selection import left_out_text
from edgefl.errors import JobCancelled, TaskError
from edgefl.flower.apps.app import KIND, FlowerApp, RunConfigValue, client_reference, fuse_run_config, require_flower
from edgefl.flower.run import FlowerRunResult, keep_model, raise_with_reasons, result_of, serving, took_part
from edgefl.operator.client import CloudClient
from edgefl.operator.relay import Relay
from edgefl.records import RoundReport
from edgefl.task import Located, UserCode

_log = logging.getLogger(__name__)


def run_on_fleet(  # noqa: PLR0913 - most are callbacks
    app: FlowerApp, client: Callable[[], CloudClient], run_config: Mapping[str, RunConfigValue] | None = None, *,
    on_start: Callable[[str, int], None] | None = None, on_round: Callable[[RoundReport], None] | None = None,
    on_waiting: Callable[[str], None] | None = None, out: Path | None = None, label: str | None = None,
    on_note: Callable[[str], None] | None = None,
) -> FlowerRunResult:  # fmt: skip
    """Run an app's ServerApp to its end, with the devices that are online as its nodes.

    `client` opens a connection to the cloud; `run_config` overrides the app's. Callbacks: `on_start` gets the relay's
    id and the number of devices online; `on_round` each round; `on_waiting` what the cloud waits for, such as disk
    space, and an empty text when the wait is over. `out` is the path for the last strategy's arrays (safetensors);
    `label` is a name for the run, for `edgefl jobs`; `on_note` gets what else the operator should know.
    Ctrl-C ends the run with the rounds so far. Raises ConfigError, TaskError if the ServerApp raises, QuorumNotMet if
    all training failed, JobCancelled and JobFailed if the relay ended.
    """
    require_flower("a Flower app")
    from flwr.app import Context, RecordDict

    from edgefl.flower.fleet.grid import FleetDevices, FleetGrid
    from edgefl.flower.tracker import RoundTracker

    config = fuse_run_config(app, run_config or {})
    reference = client_reference(app.folder)
    packed = pack_located(Located(reference, app.folder), str(app.folder))
    if packed.left_out and on_note is not None:
        on_note(left_out_text(packed.left_out))
    with client() as uploading:
        bundle = uploading.put_blob(packed.data, hashlib.sha256(packed.data).hexdigest())
    interrupted = threading.Event()
    with ExitStack() as stack:
        relay = stack.enter_context(
            Relay(client, reference, bundle, name=packed.name, label=label, on_waiting=on_waiting)
        )
        devices = FleetDevices(relay)
        tracker = RoundTracker(time.monotonic, on_round, devices.name)
        run_id = int(relay.id.rpartition("-")[2], 16)
        grid = FleetGrid(run_id, relay, devices, config, tracker)
        stack.callback(grid.close)
        if on_start is not None:
            on_start(relay.id, len(devices.online()))
        context = Context(run_id=run_id, node_id=0, node_config={}, state=RecordDict(), run_config=dict(config))
        sources = stack.enter_context(serving(run_id))
        start_s = time.monotonic()
        try:
            with _stopped_by_interrupt(relay, interrupted), UserCode(app.name, "its ServerApp", KIND):
                app.server_app(grid, context)
                grid.finish()
        except KeyboardInterrupt:
            interrupted.set()
        except TaskError as error:
            grid.boundary.raise_fault(app.name)
            keep_model(sources, out)
            if relay.fault is None:
                raise_with_reasons(app, tracker, error)
            if interrupted.is_set():  # the app did not expect that its strategy ended early
                _log.warning("after the interrupt: %s", error)
        if relay.fault is not None and not interrupted.is_set():  # not the ServerApp's fault;
            raise relay.fault from None  # the legacy server counts exceptions as failures
        grid.boundary.raise_fault(app.name)
        tracker.finish()
        seconds = time.monotonic() - start_s
        positions = devices.positions()
        counts = took_part(tracker, len(positions), positions.__getitem__)
        result = result_of(app, tracker, sources, counts, interrupted=interrupted.is_set())
    model = keep_model(sources, out)
    return replace(
        result, engine="fleet", job=relay.id, seconds=seconds, state=context.state, model=model,
        interrupted=interrupted.is_set(),
    )  # fmt: skip


@contextmanager
def _stopped_by_interrupt(relay: Relay, interrupted: threading.Event) -> Iterator[None]:
    """Let Ctrl-C end all waits for replies, in any thread, and the strategy; a second Ctrl-C ends the app."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    from edgefl.flower.internals import Interrupted

    def stop(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        relay.stop(JobCancelled("interrupted by the operator"))
        interrupted.set()
        raise Interrupted

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
