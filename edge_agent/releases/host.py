"""The processes that serve releases: one for predictions, one for the texts of a language model."""

from __future__ import annotations

from edge_agent.generation.supervisor import GenerationSupervisor, StagedText
from edge_agent.releases.model_file import ModelFile
from edge_agent.serving.supervisor import ServingSupervisor, StagedModel


class ReleaseHost:
    """Gives each release to the process that serves its kind."""

    def __init__(self, predictions: ServingSupervisor, texts: GenerationSupervisor) -> None:
        self._predictions, self._texts = predictions, texts

    async def prepare(self, model: ModelFile, *, trial: bool) -> StagedModel | StagedText:
        """Load or try a model while others serve; raises ProtocolError."""
        if model.text:
            return await self._texts.prepare(model, trial=trial)
        return await self._predictions.prepare(model, trial=trial)

    def versions(self) -> dict[str, int]:
        """Return the releases that are served, or served again after a restart."""
        return {**self._predictions.versions(), **self._texts.versions()}
