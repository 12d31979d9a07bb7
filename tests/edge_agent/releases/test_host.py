"""Each release goes to the process of its kind, and both tell what they serve."""

from __future__ import annotations

import asyncio
from pathlib import Path

from edge_agent.releases.host import ReleaseHost
from edge_agent.releases.model_file import ModelFile


class Kind:
    def __init__(self, name) -> None:
        self.name, self.prepared = name, []

    async def prepare(self, model, *, trial):
        self.prepared.append((model.name, trial))
        return self.name

    def versions(self):
        return {self.name: len(self.prepared)}


def test_predictions_and_texts() -> None:
    predictions, texts = Kind("predictions"), Kind("texts")
    host = ReleaseHost(predictions, texts)
    plain = ModelFile(name="digits", version=1, path=Path("model.onnx"))
    text = ModelFile(name="tiny", version=1, path=Path("model.onnx"), text="{}")
    assert asyncio.run(host.prepare(plain, trial=True)) == "predictions"
    assert asyncio.run(host.prepare(text, trial=False)) == "texts"
    assert (predictions.prepared, texts.prepared) == ([("digits", True)], [("tiny", False)])
    assert host.versions() == {"predictions": 1, "texts": 1}
