"""Adapters published on their base: the patch makes the published file, and another base is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgefl.errors import ConfigError
from edgefl.models.adapters.patch import apply_patch
from edgefl.operator.adapters import at_rank_in, base_release, on_base, untrained
from edgefl.operator.client import CloudClient, load_credentials
from edgefl.operator.publish import export, publish
from edgefl.task import load_task
from edgefl.trees import EncodedTree, SpooledTree, encoded, write_tree

FOLDER = Path(__file__).parents[2] / "e2e/tasks/lora"
DOWN = "base_model.model.down@lora"


@pytest.fixture
def client(http_plane):
    with CloudClient(None, load_credentials(http_plane.credentials)) as one:
        yield one


@pytest.fixture
def adapted(tmp_path):
    """Parameters with a matrix of rank 3 in one layer."""
    rng, stored = np.random.default_rng(0), dict(encoded(SpooledTree(untrained(load_task(str(FOLDER)), tmp_path))))
    left, right = (rng.normal(size=size).astype(np.float32) for size in ((24, 3), (3, 24)))
    path = tmp_path / "adapted.safetensors"
    with path.open("wb") as file:
        write_tree(EncodedTree({**stored, f"{DOWN}_B": left, f"{DOWN}_A": right}), file)
    return path


def exported(parameters, folder):
    folder.mkdir()
    return export(load_task(str(FOLDER)), parameters, folder, compression="none", max_drop=0)


def test_an_adapter_is_published_with_a_patch_of_its_base(client, http_plane, adapted, tmp_path):
    task = load_task(str(FOLDER))
    first = publish(client, "tiny", exported(untrained(task, tmp_path), tmp_path / "base"))
    base = base_release(client, "tiny", 1)
    made = on_base(client, base, exported(adapted, tmp_path / "adapter"), task, adapted)
    release = publish(client, "tiny", made)
    assert release["base"] == first["blob"]
    assert release["patch"]["size"] < release["blob"]["size"]
    assert "an adapter on version 1: a device that has it fetches" in release["note"]
    path = http_plane.blobs.path
    apply_patch(path(first["blob"]["sha256"]), SpooledTree(path(release["patch"]["sha256"])), tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path(release["blob"]["sha256"]).read_bytes()
    assert release["metrics"]["loss"] != first["metrics"]["loss"]
    with pytest.raises(ConfigError, match="tiny has no version 7"):
        base_release(client, "tiny", 7)
    other = on_base_of_an_adapter(client, adapted, tmp_path)
    assert "is another base" in other or "not the same graph" in other


def on_base_of_an_adapter(client, adapted, tmp_path):
    """An adapter's own version is no base: its weights have moved."""
    with pytest.raises(ConfigError) as refused:
        on_base(
            client, base_release(client, "tiny", 2), exported(adapted, tmp_path / "again-adapter"),
            load_task(str(FOLDER)), adapted,
        )  # fmt: skip
    return str(refused.value)


def test_a_lower_rank_is_written_with_its_error(adapted, tmp_path):
    path, error = at_rank_in(adapted, 2, tmp_path)
    assert 0 < error < 1
    assert SpooledTree(path).factors(DOWN).rank == 2
