"""The work of `edgefl offload export`: the cloud's part of a split model as Triton's model repository.

One stage is one model, with the name that devices ask for. Several stages are models of their own, and an ensemble of
them has that name. Invariant: nothing is written unless the stages compute what the whole model does on its sample.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgefl.errors import ConfigError
from edgefl.models.session import open_session
from edgefl.models.tensors import TensorInfo, described
from edgefl.offload.cuts import ModelCut, all_tensors, find_cuts
from edgefl.offload.graph import ModelGraph, read_graph
from edgefl.offload.source import ModelSource
from edgefl.offload.stages import SplitModel, check_parity, split_model, write_stages
from edgefl.protocols.inference.repository import RepositoryModel, external_files, write_ensemble, write_repository
from edgefl.protocols.inference.service import tail_name


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportRequest:
    """What is exported."""

    cuts: Sequence[str]  # the first is the devices', the others are between stages
    folder: Path
    name: str
    version: int = 1
    max_batch: int = 32
    head: Path | None = None  # where the devices' part is written

    def __post_init__(self) -> None:
        if not self.cuts:
            raise ConfigError("name the cut at which the devices' part ends: --cut; `edgefl offload cuts` lists them")


def export_stages(source: ModelSource, request: ExportRequest) -> list[RepositoryModel]:
    """Write the repository; return its models, the one for clients last.

    Raises ConfigError for cuts that the model does not have or that are not in order, ParityError.
    """
    graph = read_graph(source.path)
    positions = [graph.position_of(one) for one in request.cuts]
    if positions != sorted(set(positions)):
        raise ConfigError(f"--cut {' --cut '.join(request.cuts)}: give each cut once, in the order of the layers")
    cuts = {cut.num_head: cut for cut in find_cuts(graph, all_tensors(graph, source.feeds))}
    for at, asked in zip(positions, request.cuts, strict=True):
        if at not in cuts:
            raise ConfigError(f"{source.who} has no cut {asked!r}: a value crosses there that cannot be sent")
    with tempfile.TemporaryDirectory(prefix="edgefl-export-") as name:
        folder = Path(name)
        for at in positions:
            _check(graph, source, cuts[at], folder)
        seen = {one.name: one for at in positions for one in cuts[at].tensors}
        paths = write_stages(graph, [*positions, len(graph.layers)], folder, (), list(seen.values()))
        models = _write(source, request, positions[0], paths)
        if request.head is not None:
            files = split_model(graph, cuts[positions[0]], folder)
            for file in (files.head, *external_files(files.head)):
                shutil.copyfile(file, request.head.with_name(file.name.replace(files.head.name, request.head.name)))
    return models


def _check(graph: ModelGraph, source: ModelSource, cut: ModelCut, folder: Path) -> None:
    own = folder / f"parity-{cut.num_head}"
    own.mkdir()
    check_parity(graph, SplitModel(split_model(graph, cut, own)), source.cases, cut)
    shutil.rmtree(own)


def _write(source: ModelSource, request: ExportRequest, at: int, paths: Sequence[Path]) -> list[RepositoryModel]:
    name, digest = tail_name(request.name, at), source.sha256
    models: list[RepositoryModel] = []
    for number, path in enumerate(paths, 1):
        session = open_session(path)
        inputs, outputs = (described(path.name, side) for side in (session.get_inputs(), session.get_outputs()))
        models.append(
            RepositoryModel(
                name=name if len(paths) == 1 else f"{name}-{number}", version=request.version, inputs=inputs,
                outputs=outputs, digest=digest, max_batch=_max_batch(request.max_batch, [*inputs, *outputs]),
            )
        )  # fmt: skip
    for model, path in zip(models, paths, strict=True):
        write_repository(request.folder, model, path)
    if len(models) > 1:
        models.append(write_ensemble(request.folder, name, models))
    return models


def _max_batch(wanted: int, infos: Sequence[TensorInfo]) -> int:
    """Return how many rows Triton may merge: none unless all tensors have a free first dimension."""
    return wanted if all(one.shape[:1] == (-1,) for one in infos) else 0
