"""From a job's parameters to a release: exported, judged, compressed under a gate, published."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pytest

from edgefl.config import JobConfig, RoundsConfig, TrainConfig
from edgefl.errors import ConfigError, NotFound, SignatureChanged, TaskError
from edgefl.models.sample import read_sample
from edgefl.models.session import open_session
from edgefl.operator.client import CloudClient, load_credentials
from edgefl.operator.publish import (
    check_request,
    export,
    parameters_of,
    parse_metrics,
    publish,
    publish_onnx,
    trained_job,
)  # fmt: skip
from edgefl.operator.run import submit, watch
from edgefl.task import load_task
from edgefl.training.samples import test_samples as held_out
from tests import onnx_models

CONFIG = JobConfig(rounds=RoundsConfig(count=2), train=TrainConfig(lr=0.5))


@pytest.fixture
def client(http_plane):
    with CloudClient(None, load_credentials(http_plane.credentials)) as one:
        yield one


@pytest.fixture
def trained(client, trainers, wide_task, tmp_path):
    job = submit(client, str(wide_task), load_task(str(wide_task)), CONFIG)
    watch(client, job)
    return parameters_of(client, trained_job(client, job), tmp_path)


def test_int8_is_published_with_its_accuracy_and_report(client, http_plane, wide_task, trained, tmp_path):
    exported = export(load_task(str(wide_task)), trained, tmp_path, compression="int8", max_drop=0.1)
    release = publish(client, "signs", exported)
    assert (release["model"], release["version"]) == ("signs", 1)
    assert release["metrics"].keys() == {"accuracy", "accuracy_drop", "loss", "before/accuracy", "before/loss"}
    assert release["compression"]["accuracy_after"] == release["metrics"]["accuracy"]
    assert http_plane.blobs.path(release["blob"]["sha256"]).read_bytes() == exported.path.read_bytes()


def test_uncompressed_is_published_with_the_tasks_metrics(client, wide_task, trained, tmp_path):
    release = publish(
        client, "signs", export(load_task(str(wide_task)), trained, tmp_path, compression="none", max_drop=0)
    )
    assert release["metrics"].keys() == {"loss", "accuracy"}
    assert release["compression"] is None


def test_a_finished_onnx_file_is_published_as_it_is(client, http_plane, wide_task, trained, tmp_path):
    path = export(load_task(str(wide_task)), trained, tmp_path, compression="none", max_drop=0).path
    release = publish_onnx(client, "signs", path)
    assert http_plane.blobs.path(release["blob"]["sha256"]).read_bytes() == path.read_bytes()


def test_a_release_carries_a_sample_of_the_tasks_data_and_of_the_file_itself(
    client, http_plane, wide_task, trained, tmp_path
):
    task = load_task(str(wide_task))
    exported = export(task, trained, tmp_path, compression="int8", max_drop=0.5)
    release = publish(client, "signs", exported)
    sample = read_sample(http_plane.blobs.path(release["sample"]["sha256"]), "signs")
    rows = held_out(task, {}).inputs.numpy()
    session = open_session(exported.path)
    for case, count in zip(sample.cases, (1, 3), strict=True):
        assert case.inputs["input"].tolist() == rows[:count].tolist()
        assert np.allclose(case.outputs["output"], session.run(None, {"input": rows[:count]})[0], atol=1e-6)
    assert release["inputs"] == {"input": f"FP32[-1,{rows.shape[1]}]"}
    assert http_plane.registry.release("signs").sample.sha256 == release["sample"]["sha256"]


def test_a_foreign_file_is_published_with_its_packed_data_its_sample_and_metrics(client, http_plane, tmp_path):
    path, rows = tmp_path / "m.onnx", np.ones((2, 3), np.float32)
    path.write_bytes(onnx_models.affine())
    np.savez(tmp_path / "s.npz", x=rows)
    release = publish_onnx(client, "m", path, sample=tmp_path / "s.npz", metrics={"r2": 0.5})
    assert (release["metrics"], release["note"]) == ({"r2": 0.5}, "")
    sample = read_sample(http_plane.blobs.path(release["sample"]["sha256"]), "m")
    assert [case.outputs["y"].tolist() for case in sample.cases] == [[[3.0] * 3] * n for n in (1, 2, 3)]


def test_another_signature_needs_consent_before_anything_is_uploaded(client, http_plane, tmp_path):
    for features in (3, 4):
        (tmp_path / f"{features}.onnx").write_bytes(onnx_models.affine(features=features))
    publish_onnx(client, "m", tmp_path / "3.onnx")
    with pytest.raises(SignatureChanged, match=r"x FP32\[-1,3\]; this file has x FP32\[-1,4\]"):
        publish_onnx(client, "m", tmp_path / "4.onnx")
    assert publish_onnx(client, "m", tmp_path / "4.onnx", new_signature=True)["version"] == 2


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize(
    ("save", "said"),
    [
        (lambda path: path.write_bytes(b"no zip"), "is not an .npz file of arrays"),
        (lambda path: path.touch(), "is not an .npz file"),
        (lambda path: path.write_bytes(npy(np.ones(3))), "holds one array without a name"),
        (lambda path: np.savez(path, x=np.array([{}])), "is not an .npz file of arrays: Object arrays"),
    ],
)
def test_what_is_no_npz_is_refused(client, tmp_path, save, said):
    (tmp_path / "m.onnx").write_bytes(onnx_models.affine())
    save(tmp_path / "s.npz")
    with pytest.raises(ConfigError, match=said):
        publish_onnx(client, "m", tmp_path / "m.onnx", sample=tmp_path / "s.npz")


def test_metrics_are_names_and_finite_numbers():
    assert parse_metrics(["a=0.5", "b=-1e3"]) == {"a": 0.5, "b": -1000.0}
    for wrong in (["a"], ["=1"], ["a=x"], ["a=nan"], ["a=1", "a=2"]):
        with pytest.raises(ConfigError, match="--metrics"):
            parse_metrics(wrong)


@pytest.mark.parametrize("content", [None, b"no tensors at all"])
def test_parameters_that_are_none_are_named(wide_task, tmp_path, content):
    path = tmp_path / "notes.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"notes\.txt does not hold parameters in safetensors format"):
        export(load_task(str(wide_task)), path, tmp_path, compression="none", max_drop=0)


def test_parameters_of_another_model_are_refused(plain_task, wide_task, http_plane, tmp_path):
    other = http_plane.blobs.path(http_plane.blobs.put_tree({}).sha256)
    with pytest.raises(TaskError, match="not the parameters"):
        export(load_task(str(wide_task)), other, tmp_path, compression="none", max_drop=0)
    with pytest.raises(TaskError, match="no model"):
        export(load_task(str(plain_task)), other, tmp_path, compression="none", max_drop=0)


def test_what_is_no_onnx_file_is_refused(client, http_plane, tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"not onnx")
    with pytest.raises(ConfigError, match="not a model that ONNX Runtime can open"):
        publish_onnx(client, "m", tmp_path / "x.onnx")
    assert http_plane.registry.list() == []


@pytest.mark.parametrize(
    ("model", "max_drop", "said"),
    [
        ("My Model", 0.1, "'My Model' cannot be a model's name: expected 1 to 64 of a-z"),
        ("m", 2.0, "--max-drop 2.0 must be in 0..1"),
        ("m", float("nan"), "--max-drop nan must be in 0..1"),
    ],
)
def test_what_the_end_would_refuse_is_refused_at_the_beginning(model, max_drop, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        check_request(model, max_drop)


def test_files_that_are_not_there_are_refused_at_the_beginning(tmp_path):
    check_request("m", 0.1, None, Path(__file__))
    with pytest.raises(ConfigError, match=r"y\.onnx: there is no such file"):
        check_request("m", 0.1, None, tmp_path / "y.onnx")


def test_a_relay_has_no_model_to_publish(client, http_plane):
    relay = http_plane.relays.start("app:app", http_plane.blobs.put(b"zip"))
    with pytest.raises(ConfigError, match="carries a Flower app's messages"):
        trained_job(client, relay)


def test_an_unknown_compression_or_job_is_refused(client, wide_task, tmp_path):
    with pytest.raises(ConfigError, match=r"int4.*int8, none"):
        export(load_task(str(wide_task)), tmp_path, tmp_path, compression="int4", max_drop=0)
    with pytest.raises(NotFound):
        trained_job(client, "job-0")
