"""A model with its sample, from a file or a task."""

from __future__ import annotations

import numpy as np
import pytest

from edgefl.errors import ConfigError
from edgefl.offload.source import source_of_file, source_of_task
from edgefl.task import load_task
from tests.edgefl.offload.graphs import residual, rows


def test_a_file_s_sample_is_made_or_given(tmp_path):
    path = residual(tmp_path / "m.onnx", external=True)  # its weights stay where they are
    made = source_of_file(path)
    assert [one["x"].shape for one in made.cases] == [(1, 4), (3, 4)]
    np.savez(tmp_path / "given.npz", x=rows(50))
    given = source_of_file(path, tmp_path / "given.npz", release=("mine", 3))
    assert (given.who, given.feeds["x"].tolist()) == ("mine version 3", rows(50)[:1].tolist())
    np.savez(tmp_path / "given.npz", other=rows())
    with pytest.raises(ConfigError, match="it has the inputs other, the model takes x"):
        source_of_file(path, tmp_path / "given.npz")


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "m.onnx").write_text("no model")
    with pytest.raises(ConfigError, match=r"m\.onnx is not a model that ONNX Runtime can open"):
        source_of_file(tmp_path / "m.onnx")


def test_a_task_is_exported_with_its_own_data(tmp_path):
    found = source_of_task(load_task("examples/digits"), tmp_path)
    assert found.task is not None
    assert [one["input"].shape[0] for one in found.cases] == [1, 3]
    with pytest.raises(ConfigError, match="does not hold parameters in safetensors format"):
        source_of_task(load_task("examples/digits"), tmp_path, tmp_path / "none.safetensors")
