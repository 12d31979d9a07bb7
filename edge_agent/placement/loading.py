"""Load the parts of a placed release, and make a `PlacedModel` of them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

from edge_agent.placement.placed_file import file_of
from edge_agent.placement.placed_model import PlacedModel, PlacedRelease
from edge_agent.placement.tail_client import TailClient
from edge_agent.serving.wire import LoadModel, TailAccess
from edge_agent.sessions import load
from edgefl.errors import ProtocolError
from edgefl.models.sample import read_sample
from edgefl.models.tensors import TensorInfo
from edgefl.protocols.inference.placement import split_address
from edgefl.protocols.tls import Identity
from edgefl.trees import Tree


def load_placed(request: LoadModel, access: TailAccess, draws: random.Random) -> PlacedModel:
    """Load and warm up what a device runs of a release; raises ProtocolError if a part does not run.

    Each part is compared with its own sample. Whether a stage server is there is not asked: it may come later.
    """
    placed = file_of(request.placed)
    paths = placed.paths(Path(request.path).parent)
    parts = {part: load(request.name, request.version, *files) for part, files in paths.items()}
    candidates = placed.candidates()
    release = PlacedRelease(
        name=request.name, version=request.version, digest=placed.digest, inputs=_infos(placed.inputs),
        outputs=_infos(placed.outputs), offload=placed.offload, candidates=tuple(candidates),
    )  # fmt: skip
    addresses = list(access.addresses) or list(placed.offload.stages)
    for one in addresses:
        split_address(one)
    identity = Identity.in_folder(Path(access.home)) if access.home else None
    return PlacedModel(release, parts, TailClient(addresses, identity, access.device), draws)


def sample_inputs(request: LoadModel) -> Tree:
    """Return the smallest inputs of a release's sample; empty if it has none."""
    if not request.sample:
        return {}
    return read_sample(Path(request.sample), f"model {request.name} version {request.version}").cases[0].inputs


def _infos(described: Mapping[str, str]) -> tuple[TensorInfo, ...]:
    if not described:
        raise ProtocolError("the release does not say what the model takes and returns; publish it again")
    return tuple(TensorInfo.parsed(name, text) for name, text in described.items())
