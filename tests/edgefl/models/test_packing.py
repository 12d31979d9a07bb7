"""Models whose tensors lie in other files become one file, or are refused in words."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from edgefl.errors import ConfigError
from edgefl.models import packing
from edgefl.models.packing import packed
from edgefl.models.session import open_session
from tests import onnx_models


@pytest.fixture
def spread(tmp_path):
    """A model of two files: y = x + 1...4."""
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 4]) for name in "xy"]
    known = [numpy_helper.from_array(np.arange(1, 5, dtype=np.float32), "w")]
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], known)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="m.data", size_threshold=0)
    return path


def test_external_data_are_packed_in(spread, tmp_path):
    one = packed(spread, tmp_path)
    assert one == tmp_path / "m.onnx"
    spread.with_name("m.data").unlink()
    [y] = open_session(one).run(None, {"x": np.zeros((1, 4), np.float32)})
    assert y.tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("content", [onnx_models.affine(), b"no onnx", b"location, but no onnx"])
def test_a_file_that_refers_to_no_other_stays_as_it_is(tmp_path, content):
    (tmp_path / "m.onnx").write_bytes(content)
    assert packed(tmp_path / "m.onnx", tmp_path / "other") == tmp_path / "m.onnx"


def test_data_that_are_missing_or_elsewhere_are_named(spread, tmp_path):
    data = spread.with_name("m.data")
    data.rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"keeps tensors in m\.data, which cannot be packed"):
        packed(spread, tmp_path)
    data.symlink_to(tmp_path / "elsewhere")  # onnx follows no links
    with pytest.raises(ConfigError, match=r"keeps tensors in m\.data, which cannot be packed"):
        packed(spread, tmp_path)


def test_what_no_single_file_can_hold_is_refused(spread, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "MAX_FILE_BYTES", spread.stat().st_size + 3)
    with pytest.raises(ConfigError, match="with all its tensors; a release is one ONNX file of less than 2 GiB"):
        packed(spread, tmp_path)
    monkeypatch.setattr(packing, "MAX_FILE_BYTES", 10)
    with pytest.raises(ConfigError, match="less than 2 GiB"):
        packed(spread, tmp_path)
    (tmp_path / "empty.onnx").touch()
    with pytest.raises(ConfigError, match="is empty"):
        packed(tmp_path / "empty.onnx", tmp_path)
