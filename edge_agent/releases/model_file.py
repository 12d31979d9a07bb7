"""An installed release, as the processes that serve releases see it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edge_agent.placement.placed_file import file_of
from edgefl.protocols.fields import from_json, parse_json
from edgefl.protocols.inference.texts import TextStage


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFile:
    """The file of an installed release."""

    name: str
    version: int
    path: Path
    sample: Path | None = None  # it is run on this; older releases have none
    placed: str = ""  # of a placed release, whose parts are beside `path`: a `PlacedFile` as JSON
    text: str = ""  # of a language model, whose files are beside `path`: a `TextStage` as JSON

    @property
    def folder(self) -> Path:
        """The folder with the release's files."""
        return self.path.parent

    def text_stage(self) -> TextStage:
        """Return what the release says of a language model."""
        return from_json(TextStage, parse_json(self.text))

    def files(self) -> list[tuple[Path, Path | None]]:
        """Return the files to load, each with its sample."""
        if not self.placed:
            return [(self.path, self.sample)]
        return [*file_of(self.placed).paths(self.path.parent).values()]
