"""An installed release as processes see it: which files, and what it says of a language model."""

from __future__ import annotations

import json
from pathlib import Path

from edge_agent.releases.model_file import ModelFile
from edgefl.protocols.fields import to_json
from edgefl.protocols.inference.texts import TextStage
from edgefl.protocols.messages import BlobRef

REF = BlobRef(sha256="a" * 64, size=7)


def test_a_plain_release_has_one_file_and_its_sample() -> None:
    model = ModelFile(name="m", version=1, path=Path("/a/model.onnx"), sample=Path("/a/sample"))
    assert model.files() == [(Path("/a/model.onnx"), Path("/a/sample"))]
    assert model.folder == Path("/a")


def test_a_language_model_says_where_its_tail_is() -> None:
    stage = TextStage(record=REF, tokenizer=REF, tail="h:1")
    model = ModelFile(name="m", version=1, path=Path("/a/model.onnx"), text=json.dumps(to_json(stage)))
    assert model.text_stage() == stage
    assert hash(model) == hash(ModelFile(name="m", version=1, path=Path("/a/model.onnx"), text=model.text))
