"""Looks after a placed model while it is served: probes a tail that failed, plans anew, and tells how it is placed.

With `auto`, the plan follows the measured link and load (`edgefl.offload.plans.replan`): another placement is taken if
it is better by a tenth, three looks in a row, and not within half a minute of the last change.
"""

from __future__ import annotations

import asyncio
import logging
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from edge_agent.placement.breaker import CLOSED
from edge_agent.placement.placed_model import Compute, PlacedModel
from edgefl.errors import ConfigError
from edgefl.logs import event
from edgefl.offload.plans.planner import SplitOption
from edgefl.offload.plans.replan import PlannedModel, Replanner
from edgefl.protocols.inference.placement import Placement, head_name
from edgefl.trees import Tree

LOOK_S = 1.0
MEASURE_S = 30.0  # between two measurements of a link that no request uses
PROBE_S = 10.0  # time limit of a probe
TELL_S = 10.0  # between two notes of numbers
STATE = ("placement", "form", "server", "breaker")  # that is told at once
REASONS = 5  # that are told

_log = logging.getLogger(__name__)


class PlacementKeeper:
    """Runs beside one placed model, in the serving process's event loop."""

    def __init__(
        self, model: PlacedModel, sample: Tree, compute: Compute, tell: Callable[[dict[str, Any]], None]
    ) -> None:  # fmt: skip
        """`sample` are inputs to measure with; empty = none. `tell` is called when the facts have changed."""
        self._model, self._sample, self._compute, self._tell = model, sample, compute, tell
        self._planned = planned_model(model) if len(model.release.candidates) > 1 else None
        self._replanner = None if self._planned is None else Replanner(self._planned)
        self._measured_s = -MEASURE_S
        self._told: dict[str, Any] = {}
        self._told_s = 0.0

    async def run(self) -> None:
        """Run until cancelled; closes the connection to the stage server then."""
        try:
            while True:
                await self.look(time.monotonic())
                self._tell_changes(time.monotonic())
                await asyncio.sleep(LOOK_S)
        finally:
            await self._model.close()

    def _tell_changes(self, now_s: float) -> None:
        """Tell the facts if the state has changed; numbers alone now and then, since the agent writes them to disk."""
        facts = self.facts()
        state = {name: facts[name] for name in STATE}
        if state != {name: self._told.get(name) for name in STATE} or (
            facts != self._told and now_s - self._told_s >= TELL_S
        ):
            self._told, self._told_s = facts, now_s
            self._tell(facts)

    async def look(self, now_s: float) -> None:
        """Do what is due: a probe, a measurement of the link, a look at the plan."""
        model = self._model
        if model.breaker.takes_probe(now_s):
            model.tail.renew(elsewhere=True)
            await model.probe(self._sample, PROBE_S, self._compute)
            if model.breaker.state == CLOSED:
                event(_log, logging.INFO, "placement.tail_back", model=model.name, server=model.tail.address)
        elif model.breaker.state == CLOSED and self._replanner is not None and now_s - self._measured_s >= MEASURE_S:
            self._measured_s = now_s
            model.tail.renew()
            await model.probe(self._sample, PROBE_S, self._compute)
        if self._replanner is not None and model.breaker.state == CLOSED and model.meter.link is not None:
            self._replan(self._replanner, now_s)

    def _replan(self, replanner: Replanner, now_s: float) -> None:
        model, meter = self._model, self._model.meter
        link = meter.link
        if link is None:
            return
        try:
            option = replanner.look(now_s, link, device_load=meter.device_load, cloud_load=meter.cloud_load)
        except ConfigError as error:
            event(_log, logging.WARNING, "placement.none_fits", model=model.name, reason=error)
            return
        if option.name != model.current.name:
            event(_log, logging.INFO, "placement.changed", model=model.name, before=model.current.name,
                  after=option.name, link=meter)  # fmt: skip
            model.current = next(one for one in model.release.candidates if one.name == option.name)

    def facts(self) -> dict[str, Any]:
        """Return how the model is placed and what became of its requests, as JSON data."""
        model, counts = self._model, self._model.counts
        latencies = counts.latencies_ms
        return {
            "placement": model.current.name,
            "form": model.current.form,
            "server": model.tail.address,
            "breaker": model.breaker.state,
            "reason": model.breaker.reason,
            "link": str(model.meter),
            "remote": counts.remote,
            "local": counts.local,
            "fallback": counts.fallback,
            "cascade_rows": counts.cascade_rows,
            "refused": counts.refused,
            "reasons": dict(counts.reasons.most_common(REASONS)),
            "p50_ms": round(statistics.median(latencies), 2) if latencies else 0.0,
        }


def planned_model(model: PlacedModel) -> PlannedModel:
    """Return what a plan needs: the device's own times, the publisher's for the cloud, between the placements.

    The layers between two placements count as one. A head's time on this device was measured when it was loaded.
    """
    candidates = sorted(model.release.candidates, key=lambda one: one.layers)
    own_ms = [device_ms(model, one) for one in candidates]
    whole_ms = max(one.device_ms + one.cloud_ms for one in candidates)
    steps = [0.0, *own_ms]
    device = [max(0.0, after - before) for before, after in pairwise(steps)]
    cloud_left = [whole_ms, *(one.cloud_ms for one in candidates)]
    cloud = [max(0.0, before - after) for before, after in pairwise(cloud_left)]
    rest = candidates[-1].cloud_ms  # behind the last placement: never on this device
    slower = [own / one.device_ms for own, one in zip(own_ms, candidates, strict=True) if one.device_ms > 0]
    options = [
        SplitOption(
            name=one.name, num_head=number, form=one.form, up_bytes=one.up_bytes, down_bytes=one.down_bytes,
            encode_ms=one.encode_ms, decode_ms=one.decode_ms, device_bytes=one.device_bytes, leaves=one.leaves,
        )
        for number, one in enumerate(candidates, 1)
    ]  # fmt: skip
    return PlannedModel(
        options=options, device_ms=[*device, 0.0], cloud_ms=[*cloud, rest], objective=model.release.offload.objective,
        encoding_factor=statistics.median(slower) if slower else 1.0,
    )  # fmt: skip


def device_ms(model: PlacedModel, placement: Placement) -> float:
    """Return the time of a placement's head on this device, as it was measured when it was loaded."""
    return 0.0 if placement.head is None else 1e3 * model.parts[head_name(placement.layers)].run_s
