"""Sessions: what opens none, and what is said of it."""

import sys

import pytest

from edgefl.errors import ConfigError, MissingExtra
from edgefl.models.session import open_session


def test_what_is_not_a_model(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    for name in ("m.onnx", "missing.onnx"):
        with pytest.raises(ConfigError, match=f"{name} is not a model that ONNX Runtime can open"):
            open_session(tmp_path / name)


def test_onnxruntime_missing_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match=r"\[agent\]"):
        open_session(tmp_path / "m.onnx")
