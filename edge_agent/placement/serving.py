"""A placed model as the serving process has it: loaded, and looked after while it serves."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edge_agent.placement.keeper import PlacementKeeper, device_ms
from edge_agent.placement.loading import load_placed, sample_inputs
from edge_agent.placement.placed_model import Compute, PlacedModel
from edge_agent.serving.wire import LoadModel, TailAccess
from edgefl.trees import Tree

Tell = Callable[[str, int, dict[str, Any], dict[str, float]], None]  # model, version, facts, profile in ms


@dataclass(frozen=True, slots=True)
class PlacedServing:
    """A placed model with the inputs to measure it with."""

    model: PlacedModel
    sample: Tree

    @property
    def name(self) -> str:
        return self.model.name

    def keeper(self, compute: Compute, tell: Tell) -> PlacementKeeper:
        """Return what looks after the model; `tell` gets what changes."""
        model = self.model
        profile = {one.name: device_ms(model, one) for one in model.release.candidates if one.head is not None}
        return PlacementKeeper(
            model, self.sample, compute, lambda facts: tell(model.name, model.version, facts, profile)
        )  # fmt: skip


def load_serving(request: LoadModel, access: TailAccess) -> PlacedServing:
    """Load a placed release; raises ProtocolError."""
    return PlacedServing(load_placed(request, access, random.Random()), sample_inputs(request))  # noqa: S311 - jitter
