"""Adapters in a model in parts: products of each device, their mean in both parts, the next round, as unsplit ones."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from cloud.split.fold import folded
from edgefl import Task
from edgefl.aggregation import make_rule
from edgefl.config import JobConfig
from edgefl.errors import ConfigError, ProtocolError, TaskError
from edgefl.offload.training.model import MAX_RANKS, PartedModel
from edgefl.operator.split import divided_tensors
from edgefl.protocols.messages import Division
from edgefl.records import RoundOutcome, Update
from edgefl.settings.split import SplitConfig
from edgefl.training.local import train_locally
from edgefl.trees import Array, Tree, encoded, factors_of, write_tree
from edgefl.trees.factors import is_low_rank
from edgefl.trees.views import joined
from tests.cloud.split.bench import Bench, settings
from tests.edgefl.offload.training.models import decoder, picture_task, token_task, vit

RANKS = {"device-1": 2, "device-2": 3}
WEIGHTS = {"device-1": 1.0, "device-2": 3.0}


def adapted(model: Any, *layers: str, **more: Any) -> Any:
    """Return a task's `model` with adapters on layers of these names."""

    def make(rank: int = 2) -> torch.nn.Module:
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[*layers], **more)
        return get_peft_model(model(), config)

    return make


def language_task() -> Task:
    return token_task(adapted(decoder, "q_proj", "v_proj", "up_proj"))


def vision_task() -> Task:
    return picture_task(adapted(vit, "q_proj", "fc1", "classifier"))


def unsplit_change(task: Task, tensors: Tree, config: Any, device: str, names: Any) -> Tree:
    """Return the change of the tensors of these names by training the whole model."""
    local = dataclasses.replace(config, mode="local", split=SplitConfig())
    moving = {name: tensors[name] for name in names}
    frozen = {name: tensors[name] for name in tensors if name not in moving}
    options = {"lora_rank": str(RANKS[device])}
    return train_locally(task, moving, local, options=options, round=config.round, client=device, frozen=frozen).tree


def largest_difference(one: Tree, other: Tree) -> float:
    assert set(one) == set(other)
    return max(float(np.abs(one[name] - other[name]).max(initial=0.0)) for name in one)


@pytest.mark.parametrize(
    ("make_task", "cut"),
    [
        (language_task, {"cut": "1", "last_cut": "2", "micro_batches": 2}),
        (language_task, {"cut": "2"}),
        (vision_task, {"cut": "vit.vit.layers.0"}),
    ],
)
def test_two_rounds_of_two_ranks_are_those_of_whole_models(make_task: Any, cut: dict[str, Any], tmp_path: Path) -> None:
    task, config = make_task(), settings(cut, epochs=2)
    bench, division = Bench(task, config, tmp_path), divided_tensors(task, config)
    names = {*division.moving, *division.in_cloud}
    assert any(is_low_rank(name) for name in division.moving)
    assert any(is_low_rank(name) for name in division.in_cloud)
    for number in (1, 2):
        bench.config = dataclasses.replace(config, round=number)
        bench.restart_cloud()
        before = bench.tensors
        device_mean = make_rule("mean", {name: before[name] for name in division.moving})
        wanted = {name: np.zeros(before[name].shape) for name in names}
        for device, rank in RANKS.items():
            loop = bench.device(device, rank=rank)
            loop.train()
            model = PartedModel(task=task, config=bench.config, rank=rank)
            moved = loop.run.half.state.moving()
            update = model.update(moved, {name: before[name] for name in division.moving})
            found = bench.files.result(number, device)
            assert found is not None
            in_cloud = {name: one if is_low_rank(name) else one - before[name] for name, one in found[0].items()}
            change = unsplit_change(task, before, bench.config, device, names)
            assert largest_difference(joined(update, in_cloud), change) < 1e-5
            assert all(one.rank == rank for name in update if (one := factors_of(update, name)) is not None)
            device_mean.add(Update(job="job-1", round=number, device=device, tree=update, weight=WEIGHTS[device]))
            bench.files.write_result(number, device, found[0], int(WEIGHTS[device]))
            for name in names:
                wanted[name] += WEIGHTS[device] / sum(WEIGHTS.values()) * change[name].astype(np.float64)
        after = folded(
            bench.files, JobConfig(train=bench.config),
            Division(in_cloud=division.in_cloud, buffers=division.cloud_buffers),
            {name: before[name] for name in before if name not in division.moving}, outcome(number),
        )  # fmt: skip
        mean = device_mean.result()
        moving = {name: before[name] + mean[name].astype(before[name].dtype) for name in division.moving}
        bench.tensors = joined(before, after, moving)
        change = {name: bench.tensors[name] - before[name] for name in names}
        assert largest_difference(change, wanted) < 1e-6
        with bench.blob.open("wb") as file:
            write_tree(bench.tensors, file)


def outcome(number: int) -> RoundOutcome:
    return RoundOutcome(
        job="job-1", round=number, parameters={}, admitted=tuple(RANKS), rejected={}, failed={}, missing=(), weight=4.0,
        metrics={}, seconds=1.0, up_bytes=0, down_bytes=0,
    )  # fmt: skip


def test_a_connection_that_is_lost_changes_nothing(tmp_path: Path) -> None:
    results = []
    for cuts in ((), (5, 9, 14)):
        folder = tmp_path / str(len(cuts))
        folder.mkdir()
        bench = Bench(language_task(), settings({"cut": "1", "last_cut": "2"}, epochs=2), folder)
        loop = bench.device(cuts=cuts)
        loop.train()
        found = bench.files.result(1, "device-1")
        assert found is not None
        results.append({**loop.run.half.state.moving(), **{name: found[0][name] for name in found[0]}})
    one, other = results
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_the_cloud_s_results_travel_as_factors(tmp_path: Path) -> None:
    bench = Bench(language_task(), settings({"cut": "1"}), tmp_path)
    bench.device().train()
    found = bench.files.result(1, "device-1")
    assert found is not None
    stored: dict[str, Array] = dict(encoded(found[0]))
    matrices = [name for name in found[0] if is_low_rank(name)]
    assert matrices
    assert all(f"{name}_B" in stored and stored[f"{name}_B"].shape[1] == 2 for name in matrices)


def test_a_frozen_device_part_begins_with_adapters_that_do_nothing(tmp_path: Path) -> None:
    task, config = language_task(), settings({"cut": "1", "device_part": "frozen"})
    division = divided_tensors(task, config)
    assert not division.moving
    assert any(is_low_rank(name) for name in division.on_device)
    bench = Bench(task, config, tmp_path)
    bench.device().train()
    found = bench.files.result(1, "device-1")
    assert found is not None
    assert all(np.abs(found[0][name]).max() > 0 for name in found[0] if is_low_rank(name))


def test_what_cannot_be_exact_is_refused() -> None:
    task = language_task()
    with pytest.raises(ConfigError, match=r"adapter of 'base_model.*' in the cloud.*cloud_part='per-device'"):
        PartedModel(task=task, config=settings({"cut": "1", "cloud_part": "shared"})).parts("")
    with pytest.raises(TaskError, match=r"train.keep_optimizer_state=true"):
        PartedModel(task=task, config=settings({"cut": "1"}, keep_optimizer_state=True))
    through = settings({"cut": "vit.vit.layers.0.attention.q_proj.lora_A.default"})
    with pytest.raises(ConfigError, match=r"a cut goes through the adapter of layer|would be trained"):
        divided_tensors(picture_task(adapted(vit, "q_proj")), through)


def test_a_job_has_adapters_of_a_few_ranks() -> None:
    model = PartedModel(task=language_task(), config=settings({"cut": "1"}))
    assert model.of_rank(0) is model
    assert model.of_rank(3) is model.of_rank(3)
    for rank in range(4, 3 + MAX_RANKS):
        model.of_rank(rank)
    with pytest.raises(ProtocolError, match=r"adapters of rank 99, and others of 8 ranks in one job: 3, 4, "):
        model.of_rank(99)


def test_missing_matrices_are_named() -> None:
    model = PartedModel(task=language_task(), config=settings({"cut": "1"}))
    with pytest.raises(TaskError, match=r"@lora is missing among the tensors of this part"):
        model.device_state(model.parts(""), {})
