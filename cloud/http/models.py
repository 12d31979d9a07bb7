"""Routes about models: publish and list releases, roll them out, watch."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import Field

from cloud.http.services import Services
from cloud.http.shared import HEARTBEAT, Body, Here, known, stream_lines
from cloud.state.registry import Tensors
from edgefl.errors import ConfigError, NotFound, ProtocolError
from edgefl.protocols.inference.placement import Offload
from edgefl.protocols.inference.texts import TextStage
from edgefl.protocols.messages import BlobRef, from_json

operator = APIRouter()


class ReleaseRequest(Body):
    """An uploaded ONNX file, its metrics and its sample, and the datatype and shape of its inputs and outputs."""

    blob: BlobRef
    metrics: dict[str, float] = Field(default_factory=dict)
    sample: BlobRef | None = None  # older clients send none of these
    inputs: dict[str, str] = Field(default_factory=dict)
    outputs: dict[str, str] = Field(default_factory=dict)
    offload: dict[str, Any] | None = None  # how it is placed, as `edgefl.protocols.inference.placement.Offload`
    base: BlobRef | None = None  # the file to which `patch` adds adapters
    patch: BlobRef | None = None
    text: dict[str, Any] | None = None  # of a language model: `edgefl.protocols.inference.texts.TextStage`
    new_signature: bool = False  # allows other inputs and outputs than those of the version before


class RolloutRequest(Body):
    """Which version to roll out, and to which devices: `to` holds all, TAG=VALUE and name:DEVICE."""

    model: str
    version: int | None = None
    to: list[str] = Field(default_factory=lambda: ["all"])
    rollback: bool = False


@operator.post("/v1/models/{name}/releases")
def publish(name: str, body: ReleaseRequest, here: Here) -> dict[str, Any]:
    """Sign an uploaded model as the next version."""
    try:
        offload = None if body.offload is None else from_json(Offload, body.offload)
        text = None if body.text is None else from_json(TextStage, body.text)
    except ProtocolError as cause:
        raise ConfigError(str(cause)) from cause
    tensors = Tensors(
        sample=body.sample, inputs=body.inputs, outputs=body.outputs, base=body.base, patch=body.patch, text=text
    )  # fmt: skip
    signed = here.registry.publish(
        name, body.blob, body.metrics, tensors, new_signature=body.new_signature, offload=offload
    )
    facts: dict[str, Any] = json.loads(signed.text)
    return facts


@operator.get("/v1/models")
def models(here: Here) -> list[dict[str, Any]]:
    """Return every release of every model."""
    return here.registry.list()


@operator.get("/v1/models/{name}")
def model(name: str, here: Here) -> list[dict[str, Any]]:
    """Return the releases of one model, the newest first."""
    releases = here.registry.list(name)
    if not releases:
        raise NotFound(f"there is no model {name!r}; list them with `edgefl models list`")
    return releases


@operator.post("/v1/rollouts")
def start(body: RolloutRequest, here: Here) -> dict[str, Any]:
    """Tell devices which version to serve."""
    rollout = here.rollouts.start(body.model, body.version, body.to, rollback=body.rollback)
    return here.rollouts.status(rollout)


@operator.get("/v1/rollouts")
def rollouts(here: Here) -> list[dict[str, Any]]:
    """Return every rollout, the newest first."""
    return here.rollouts.list()


@operator.get("/v1/rollouts/{rollout}")
def rollout(rollout: str, here: Here) -> dict[str, Any]:
    """Return a rollout with its devices."""
    return known(here.rollouts.status, rollout)


@operator.get("/v1/rollouts/{rollout}/events")
def events(
    request: Request, rollout: str, here: Here, within_s: Annotated[float, Query(ge=0)] = math.inf
) -> StreamingResponse:
    """Stream the rollout's status whenever it changes, heartbeats in between.

    The state in the last line is not `running`, unless the stream ended because `within_s` was over.
    """
    known(here.rollouts.status, rollout)
    return stream_lines(request, rollout_lines(here, rollout, time.monotonic() + within_s))


def rollout_lines(here: Services, rollout: str, until_s: float) -> Iterator[Mapping[str, Any]]:
    """Yield a rollout's status whenever it has changed, until it is over or the time is up."""
    revision, shown = here.rollouts.wait(-1, 0), None
    while True:
        status = here.rollouts.status(rollout)
        if status != shown:
            shown = status
            yield status
        if status["state"] != "running":
            return
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            return
        before, revision = revision, here.rollouts.wait(revision, min(here.heartbeat_s, left_s))
        if revision == before:
            yield HEARTBEAT
