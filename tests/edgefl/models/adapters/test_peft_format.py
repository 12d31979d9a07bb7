"""What peft loads of our adapters computes what our model computes, at full and at lower rank."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from edgefl.errors import ConfigError
from edgefl.models.adapters.peft_format import write_adapter
from edgefl.models.adapters.ranks import at_rank, factors_at
from edgefl.training.local import initial_parameters, make_model
from edgefl.trees import BlockTree, EncodedTree, Tree, encoded, spec_of
from tests.e2e.tasks.lora import lora_task

UP, DOWN = "base_model.model.up@lora", "base_model.model.down@lora"
HEAD = "base_model.model.head.modules_to_save.default.weight"


def trained(*, whole: bool) -> Tree:
    """Return parameters with a matrix of rank 3 in `down`, of rank 0 in `up`, and a trained head."""
    rng, stored = np.random.default_rng(0), dict(encoded(initial_parameters(lora_task.task)))
    left, right = (rng.normal(size=size).astype(np.float32) for size in ((24, 3), (3, 24)))
    stored |= {f"{DOWN}_B": left, f"{DOWN}_A": right, HEAD: rng.normal(size=(3, 24)).astype(np.float32)}
    tree = EncodedTree(stored)
    return {name: tree[name] for name in tree} if whole else tree


@pytest.mark.parametrize("whole", [False, True])
def test_peft_computes_the_same(tmp_path: Path, whole: bool) -> None:
    tree = trained(whole=whole)
    ranks = write_adapter(lora_task.task, tree, tmp_path)
    assert ranks == {"base_model.model.up": 1, "base_model.model.down": 3}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"up": 1, "down": 3}
    assert len(config["revision"]) == 64
    torch.manual_seed(7)
    loaded = PeftModel.from_pretrained(lora_task.Base(), str(tmp_path)).eval()
    inputs = lora_task.held_out()[0]
    with torch.no_grad():
        wanted = make_model(lora_task.task, tree).eval()(inputs)
        assert torch.allclose(loaded(inputs), wanted, atol=1e-4)
        torch.manual_seed(7)
        assert not torch.allclose(lora_task.Base()(inputs), wanted, atol=0.1)


def test_a_lower_rank_is_the_nearest_matrix_and_its_error_is_told() -> None:
    tree = trained(whole=True)
    near, error = at_rank(tree, 2)
    values = np.linalg.svd(tree[DOWN].astype(np.float64), compute_uv=False)
    assert error == pytest.approx(values[2] / np.sqrt(np.square(values).sum()), rel=1e-4)
    assert np.linalg.norm(near[DOWN] - tree[DOWN]) == pytest.approx(values[2], rel=1e-4)
    assert spec_of(near) == spec_of(tree)
    assert isinstance(near, BlockTree)
    assert set(near.factored) == {UP, DOWN}
    assert at_rank(tree, 24)[1] < 1e-6
    assert factors_at(tree, DOWN).rank == 3  # what is above is rounding


def test_a_task_without_adapters_has_nothing_to_write(tmp_path: Path) -> None:
    plain = dataclasses.replace(lora_task.task, model=lora_task.Base)
    with pytest.raises(ConfigError, match="has no trained adapters of peft"):
        write_adapter(plain, initial_parameters(plain), tmp_path)
    with pytest.raises(ConfigError, match="these parameters have no adapters"):
        at_rank(initial_parameters(plain), 2)
