"""The process that tries a model: its answer, and the sample that it writes."""

import json
import subprocess
import sys

import numpy as np
import pytest

from edgefl.errors import ProtocolError
from edgefl.models.sample import Case, Sample, read_sample, write_sample
from edgefl.models.trial import ANSWER, SAMPLE, make_sample, open_trial
from tests import onnx_models


@pytest.fixture
def path(tmp_path):
    (tmp_path / "m.onnx").write_bytes(onnx_models.affine())
    return tmp_path / "m.onnx"


def run(path, out, *more):
    command = [sys.executable, "-P", "-m", "edgefl.models.trial", "--model", path, "--out", out, "--within-s", "60"]
    return subprocess.run([str(one) for one in (*command, *more)], check=False, timeout=60)


def test_it_answers_with_the_signature_and_writes_the_sample(path, tmp_path):
    write_sample(Sample((Case({"x": np.ones((2, 3), np.float32)}, {}),), {}), tmp_path / "given")
    assert run(path, tmp_path, "--given", tmp_path / "given").returncode == 0
    assert json.loads((tmp_path / ANSWER).read_text()) == {
        "inputs": {"x": "FP32[-1,3]"}, "outputs": {"y": "FP32[-1,3]"}, "notes": [],
    }  # fmt: skip
    assert [len(case.outputs["y"]) for case in read_sample(tmp_path / SAMPLE, "m").cases] == [1, 2, 3]


def test_it_answers_with_the_reason(path, tmp_path):
    path.write_bytes(b"no onnx")
    assert run(path, tmp_path).returncode == 0
    assert "m.onnx is not a model that ONNX Runtime can open" in json.loads((tmp_path / ANSWER).read_text())["error"]


def test_several_given_cases_are_kept_as_they_are(path):
    given = [{"x": np.full((n, 3), n, np.float32)} for n in (1, 3)]
    sample, notes = make_sample(open_trial("m", path), given, 10.0)
    assert [case.outputs["y"][0, 0] for case in sample.cases] == [3.0, 7.0]
    assert (sample.allowed, notes) == ({"y": pytest.approx(0.007)}, [])


def test_a_sample_that_no_device_would_read_is_refused(path, monkeypatch):
    monkeypatch.setattr("edgefl.models.trial.MAX_SAMPLE_BYTES", 10)
    with pytest.raises(ProtocolError, match=r"bytes, allowed: 10\. Give a smaller one"):
        make_sample(open_trial("m", path), [], 10.0)
