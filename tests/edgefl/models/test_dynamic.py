"""Dynamic dimensions as a task declares them."""

import pytest
import torch

from edgefl.errors import TaskError
from edgefl.models.dynamic import Dimension, dimensions_of, resized, torch_shapes

INPUTS = {"tokens": torch.arange(12).reshape(2, 6), "mask": torch.ones(2, 6), "image": torch.ones(2, 3, 8, 8)}
Dim = torch.export.Dim


@pytest.mark.parametrize(
    ("dynamic", "found"),
    [
        ({}, []),
        ({"tokens": [0]}, []),
        ({"tokens": [0, 1], "mask": (1,)}, [Dimension(6, (("tokens", 1), ("mask", 1)))]),
        ({"tokens": 1}, [Dimension(6, (("tokens", 1),))]),
        ({"image": [2, 3]}, [Dimension(8, (("image", 2), ("image", 3)))]),
        ({"image": {2: "h", 3: "w"}}, [Dimension(8, (("image", 2),), "h"), Dimension(8, (("image", 3),), "w")]),
        ({"tokens": {0: Dim("n"), 1: Dim.AUTO}, "mask": None}, [Dimension(6, (("tokens", 1),))]),
        (({1: Dim("n")}, {1: Dim("n")}), [Dimension(6, (("tokens", 1), ("mask", 1)), "n")]),
        ({"tokens": {1: None}, "mask": {1: 6}}, []),
    ],
)
def test_all_forms_are_read(dynamic, found):
    assert dimensions_of(dynamic, INPUTS) == found


@pytest.mark.parametrize(
    ("dynamic", "said"),
    [
        (7, "dynamic is a int; expected axes by the name of an input"),
        ({"text": [1]}, "dynamic names 'text', which is no input; there are tokens, mask, image"),
        ({"tokens": [2]}, r"dynamic names dimension 2 of input 'tokens', whose shape is \[2, 6\]"),
        ({"tokens": ["length"]}, r"dynamic\['tokens'\] is \['length'\]; expected axes"),
    ],
)
def test_what_the_inputs_do_not_have_is_refused(dynamic, said):
    with pytest.raises(TaskError, match=said):
        dimensions_of(dynamic, INPUTS)


def test_inputs_of_another_size_are_cut_or_repeated_together():
    both = Dimension(6, (("tokens", 1), ("mask", 1)))
    found = resized(INPUTS, both, 8)
    assert found["tokens"].tolist() == [[0, 1, 2, 3, 4, 5, 0, 1], [6, 7, 8, 9, 10, 11, 6, 7]]
    assert found["mask"].shape == (2, 8)
    assert resized(INPUTS, both, 2)["tokens"].tolist() == [[0, 1], [6, 7]]
    assert both.other_sizes()[:4] == [12, 3, 7, 5]
    assert min(Dimension(1, ()).other_sizes()) == 2


def test_torch_gets_the_batch_and_the_dimensions():
    tokens, mask, image = torch_shapes(INPUTS, [Dimension(6, (("tokens", 1),))])
    assert (list(tokens), list(mask), list(image)) == ([0, 1], [0], [0])
    assert tokens[0] is mask[0] is image[0]
