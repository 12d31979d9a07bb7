"""Layouts of structures: there and back, and those that are none."""

from __future__ import annotations

import pytest
import torch

from edgefl.errors import ProtocolError, TaskError
from edgefl.offload.training.layout import example_of, filled, layout_of, with_rows

STRUCTURE = {"a": (torch.zeros(2, 3), [torch.zeros(2, dtype=torch.int64)]), "b": torch.zeros(2, 1, dtype=torch.bool)}


def test_a_layout_makes_a_structure_of_the_same_form() -> None:
    layout = layout_of(STRUCTURE)
    assert layout_of(example_of(layout)) == layout
    assert layout_of(torch.zeros(4, 1)) == '["float32",[4,1]]'
    assert layout_of(example_of(with_rows(layout, 7))["a"]) == layout_of((torch.zeros(7, 3), [torch.zeros(7).long()]))


def test_targets_are_put_into_their_form_and_others_are_refused() -> None:
    layout = layout_of((torch.zeros(2), torch.zeros(2, dtype=torch.int64)))
    tensors = {"target.0": torch.ones(2), "target.1": torch.tensor([3, 4])}
    assert filled(layout, tensors)[1].tolist() == [3, 4]
    with pytest.raises(ProtocolError, match=r"'target.1' is missing"):
        filled(layout, {"target.0": torch.ones(2), "x": torch.ones(1)})
    with pytest.raises(ProtocolError, match=r"'target.1' is torch.float32\[2\]; the layout says int64\[2\]"):
        filled(layout, tensors | {"target.1": torch.ones(2)})


@pytest.mark.parametrize(
    "layout", ["", "[", "3", '["complex64",[1]]', '["float32",[-1]]', '["float32",[1000000,1000000]]', '{"set":[]}',
               "[" * 100_000, '{"list":' * 40 + '["float32",[1]]' + "}" * 40],
)  # fmt: skip
def test_what_is_no_layout_is_refused(layout: str) -> None:
    with pytest.raises(ProtocolError):
        example_of(layout)


def test_what_has_no_layout_is_the_task_s_fault() -> None:
    with pytest.raises(TaskError, match="this is a str"):
        layout_of({"a": "text"})
