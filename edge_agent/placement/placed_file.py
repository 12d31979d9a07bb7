"""A placed release in a slot: what the agent tells the serving process of it, as JSON text.

A text can be compared and used as a key, as the agent does with the files that it serves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgefl.protocols.fields import Checked, from_json, limited, parse_json, to_json
from edgefl.protocols.inference.placement import Offload, Placement


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacedFile(Checked):
    """What of a release is in a slot."""

    digest: str = field(metadata=limited(max_chars=64))  # of the whole model
    offload: Offload
    placements: Sequence[str]  # whose files are there
    inputs: Mapping[str, str]  # of the whole model: datatype and shape by name
    outputs: Mapping[str, str]

    def candidates(self) -> list[Placement]:
        """Return the placements among which the device chooses."""
        return [*map(self.offload.placement, self.placements)]

    def paths(self, folder: Path) -> dict[str, tuple[Path, Path]]:
        """Return the files in a slot's folder by the parts' names, each with its sample."""
        return {
            part: (folder / f"{part}.onnx", folder / f"{part}.safetensors")
            for part in self.offload.parts(self.candidates())
        }


def text_of(placed: PlacedFile | None) -> str:
    """Return it as JSON; empty for None."""
    return "" if placed is None else json.dumps(to_json(placed), sort_keys=True)


def file_of(text: str) -> PlacedFile:
    """Return what `text_of` wrote; raises ProtocolError."""
    return from_json(PlacedFile, parse_json(text))
