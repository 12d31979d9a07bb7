"""A placed release as the agent tells it to the serving process."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from edge_agent.placement.placed_file import PlacedFile, file_of, text_of
from edgefl.errors import ProtocolError
from tests.edgefl.protocols.inference.test_placement import OFFLOAD

PLACED = PlacedFile(
    digest="ab" * 32, offload=OFFLOAD, placements=["cloud", "split:h"], inputs={"x": "FP32[-1,4]"},
    outputs={"y": "FP32[-1,2]"},
)  # fmt: skip


def test_it_is_the_same_after_a_journey_as_text() -> None:
    assert text_of(None) == ""
    assert text_of(file_of(text_of(PLACED))) == text_of(PLACED)
    assert [one.name for one in file_of(text_of(PLACED)).candidates()] == ["cloud", "split:h"]


def test_its_files_are_those_of_its_placements() -> None:
    folder = Path("/slot")
    assert PLACED.paths(folder) == {"head-2": (folder / "head-2.onnx", folder / "head-2.safetensors")}
    only = dataclasses.replace(PLACED, placements=["cloud"])
    assert only.paths(folder) == {}


def test_a_text_that_is_none() -> None:
    for text in ("", "{}", '{"digest": 1}'):
        with pytest.raises(ProtocolError):
            file_of(text)
