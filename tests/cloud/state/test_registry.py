"""The registry: versions without a gap, signed, and never changed."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from cloud.state.blobs import BlobStore
from cloud.state.registry import Registry, Tensors
from cloud.state.store import open_database, releases
from edgefl.errors import ConfigError, ManifestRejected, NotFound, SignatureChanged
from edgefl.protocols.inference.texts import TextStage
from edgefl.protocols.manifest import Release, new_fleet_key, verify
from edgefl.protocols.messages import BlobRef
from edgefl.testing import ManualClock

KEY = new_fleet_key()


@pytest.fixture
def blobs(tmp_path):
    return BlobStore(tmp_path / "blobs")


@pytest.fixture
def registry(tmp_path, blobs):
    engine = open_database(tmp_path / "cloud.db")
    yield Registry(engine, blobs, KEY, ManualClock(5.0))
    engine.dispose()


def test_versions_rise_by_one_for_each_model(registry, blobs):
    blob = blobs.put(b"onnx")
    versions = [verify(registry.publish(model, blob, {}), Release, KEY.public_key()).version for model in "aaba"]
    assert versions == [1, 2, 1, 3]


def test_a_release_comes_back_as_it_was_signed(registry, blobs):
    blob = blobs.put(b"onnx")
    registry.publish("digits", blob, {"accuracy": 0.97})
    registry.publish("digits", blobs.put(b"better"), {"accuracy": 0.98})
    assert registry.release("digits", 1) == Release(model="digits", version=1, blob=blob, metrics={"accuracy": 0.97})
    assert registry.release("digits").version == 2


def test_a_release_carries_its_sample_and_signature(registry, blobs):
    tensors = Tensors(sample=blobs.put(b"sample"), inputs={"x": "FP32[-1,3]"}, outputs={"y": "FP32[-1,2]"})
    registry.publish("m", blobs.put(b"onnx"), {}, tensors)
    found = registry.release("m")
    assert (found.sample, found.inputs, found.outputs) == (tensors.sample, tensors.inputs, tensors.outputs)


def test_a_sample_that_is_not_there_or_too_large_is_refused(registry, blobs, monkeypatch):
    with pytest.raises(ConfigError, match=r"the model's sample 0+\.\.\. is not in the cloud"):
        registry.publish("m", blobs.put(b"onnx"), {}, Tensors(sample=BlobRef(sha256="0" * 64, size=4)))
    monkeypatch.setattr("cloud.state.registry.MAX_SAMPLE_BYTES", 5)
    with pytest.raises(ConfigError, match="sample has 6 bytes, allowed: 5"):
        registry.publish("m", blobs.put(b"onnx"), {}, Tensors(sample=blobs.put(b"sample")))


def test_a_language_model_is_published_with_its_files(registry, blobs):
    stage = TextStage(record=blobs.put(b"record"), tokenizer=blobs.put(b"tokenizer"), tail="h:1")
    registry.publish("tiny", blobs.put(b"weights"), {}, Tensors(text=stage))
    assert registry.release("tiny").text == stage
    absent = dataclasses.replace(stage, tokenizer=BlobRef(sha256="0" * 64, size=4))
    with pytest.raises(ConfigError, match=r"the model's tokenizer 0+\.\.\. is not in the cloud"):
        registry.publish("tiny", blobs.put(b"weights"), {}, Tensors(text=absent))


def test_another_signature_needs_consent(registry, blobs):
    blob = blobs.put(b"onnx")
    first, other = Tensors(inputs={"x": "FP32[-1,3]"}), Tensors(inputs={"x": "FP32[-1,4]"})
    registry.publish("m", blob, {}, first)
    registry.publish("m", blob, {}, first)
    with pytest.raises(
        SignatureChanged, match=r"inputs of m would change: version 2 has x FP32\[-1,3\]; this file has x FP32\[-1,4\]"
    ):
        registry.publish("m", blob, {}, other)
    assert registry.release("m").version == 2
    registry.publish("m", blob, {}, other, new_signature=True)
    registry.publish("m", blob, {})  # an older client, which sends none
    registry.publish("m", blob, {}, first)  # nothing is known of the one before
    registry.publish("n", blob, {}, other)
    assert registry.release("m").version == 5


def test_list_shows_the_newest_first(registry, blobs):
    for model in ("b", "a", "b"):
        registry.publish(model, blobs.put(b"onnx"), {})
    assert [(one["model"], one["version"]) for one in registry.list()] == [("a", 1), ("b", 2), ("b", 1)]
    assert [one["version"] for one in registry.list("b")] == [2, 1]
    assert registry.list("b")[0]["created_s"] == 5.0
    assert registry.list("none") == []


def test_versions_have_no_gap_whoever_publishes_at_once(registry, blobs):
    blob = blobs.put(b"onnx")
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: registry.publish("m", blob, {}), range(24)))
    assert sorted(one["version"] for one in registry.list("m")) == list(range(1, 25))


@pytest.mark.parametrize("name", ["", "A", "a/b", "..", "-a", "a" * 65, "a b"])
def test_a_name_that_no_folder_could_have_is_refused(registry, blobs, name):
    with pytest.raises(ConfigError, match="cannot be a model's name"):
        registry.publish(name, blobs.put(b"onnx"), {})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_that_is_no_number_is_refused(registry, blobs, value):
    with pytest.raises(ConfigError, match=r"'accuracy' is .*, not a finite number"):
        registry.publish("m", blobs.put(b"onnx"), {"accuracy": value})


def test_too_many_metrics_are_refused(registry, blobs):
    with pytest.raises(ConfigError, match="65 metrics"):
        registry.publish("m", blobs.put(b"onnx"), {f"m{i}": 0.0 for i in range(65)})


def test_a_file_that_is_not_here_is_refused(registry):
    with pytest.raises(ConfigError, match="upload it first"):
        registry.publish("m", BlobRef(sha256="0" * 64, size=4), {})


def test_a_wrong_size_is_refused(registry, blobs):
    with pytest.raises(ConfigError, match="has 4 bytes, not 5"):
        registry.publish("m", BlobRef(sha256=blobs.put(b"onnx").sha256, size=5), {})


@pytest.mark.parametrize(("version", "said"), [(None, "no model 'm'"), (3, "no version 3 of model 'm'")])
def test_what_is_not_there_is_not_found(registry, version, said):
    with pytest.raises(NotFound, match=said):
        registry.release("m", version)


def test_a_row_that_was_tampered_with_is_not_believed(registry, blobs):
    registry.publish("m", blobs.put(b"onnx"), {"accuracy": 0.5})
    with registry._engine.begin() as db:
        signed = dict(db.scalar(sa.select(releases.c.signed)))
        signed["text"] = signed["text"].replace("0.5", "0.9")
        db.execute(releases.update().values(signed=signed))
    with pytest.raises(ManifestRejected, match="not signed by the fleet's key"):
        registry.release("m")
