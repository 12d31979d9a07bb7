"""Structures of tensors: their leaves, their names, and how a model gets them."""

from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch

from edgefl.errors import TaskError
from edgefl.training.structures import (
    argument_names,
    arguments,
    call,
    described,
    leaves,
    mapped,
    named,
    unnamed,
)

A, B, C = torch.ones(2, 1), torch.ones(2, 2), torch.ones(2, 3)


class Pair(NamedTuple):
    left: object
    right: object


STRUCTURES = [
    (A, ["input"]),
    ((A, B), ["input_0", "input_1"]),
    ([A, B, C], ["input_0", "input_1", "input_2"]),
    ((A,), ["input_0"]),
    ({"tokens": A, "mask": B}, ["tokens", "mask"]),
    ({"image": (A, B), "table": C}, ["image.0", "image.1", "table"]),
    (({"mask": A}, B), ["input_0.mask", "input_1"]),
    ({"a": {"b": {"c": A}}, "d": [B, (C,)]}, ["a.b.c", "d.0", "d.1.0"]),
    (Pair(A, B), ["left", "right"]),
    (OrderedDict(y=A, x=B), ["y", "x"]),
]


@pytest.mark.parametrize(("structure", "names"), STRUCTURES)
def test_leaves_have_names_in_order_and_find_back(structure, names):
    found = named(structure, "input")
    assert list(found) == names
    assert all(one is other for one, other in zip(found.values(), leaves(structure), strict=True))
    again = unnamed(dict(reversed(found.items())), structure, "input")
    assert type(again) is type(structure)
    assert all(one is other for one, other in zip(leaves(again), leaves(structure), strict=True))


def test_given_names_replace_the_first_of_a_tuple():
    assert list(named((A, (B, C), A), "input", ("image", "pair"))) == ["image", "pair.0", "pair.1", "input_2"]
    given = {"image": 1, "pair.0": 2, "pair.1": 3}
    assert unnamed(given, (A, (B, C)), "input", ("image", "pair")) == (1, (2, 3))


def test_a_missing_leaf_is_named():
    with pytest.raises(TaskError, match=r"^mask is missing; there are tokens$"):
        unnamed({"tokens": A}, {"tokens": A, "mask": B}, "input")


def test_two_leaves_of_one_name_are_refused():
    with pytest.raises(TaskError, match=r"would be named 'a\.0'"):
        named({"a": (A,), "a.0": B}, "input")


def test_a_key_that_is_no_string_is_refused():
    with pytest.raises(TaskError, match="has the key 3; expected a string"):
        named({3: A}, "input")


def test_mapped_keeps_the_form_and_takes_several():
    doubled = mapped(torch.add, {"a": (A, B)}, {"a": (A, B)})
    assert [one.tolist() for one in leaves(doubled)] == [[[2.0]] * 2, [[2.0] * 2] * 2]
    assert isinstance(doubled["a"], tuple)
    assert mapped(len, A) == 2


def test_a_packed_sequence_is_one_leaf():
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(1)])
    assert leaves({"words": packed, "n": A})[0] is packed
    assert list(named(packed, "input")) == ["input"]
    assert arguments(torch.nn.Identity(), packed) == ((packed,), {})


def test_none_and_numbers_are_leaves():
    assert leaves((A, None, 3)) == [A, None, 3]
    assert described({"a": A, "b": None}, "input") == "a float32 (2, 1), b NoneType"
    assert described((), "input") == "input is empty"


class Two(torch.nn.Module):
    def forward(self, image, table=None):
        return image, table


class Any(torch.nn.Module):
    def forward(self, *parts, **named_parts):
        return parts, named_parts


class KeywordOnly(torch.nn.Module):
    def forward(self, batch, *, scale=1):
        return batch, scale


@pytest.mark.parametrize(
    ("model", "inputs", "positional", "by_keyword", "names"),
    [
        (Two(), A, (A,), {}, ()),
        (Two(), (A, B), (A, B), {}, ("image", "table")),
        (Two(), [A, B], (A, B), {}, ("image", "table")),
        (Two(), (A,), (A,), {}, ("image",)),
        (Two(), {"table": A, "image": B}, (), {"table": A, "image": B}, ()),
        (Two(), Pair(A, B), (A, B), {}, ("image", "table")),
        (Any(), (A, B), (A, B), {}, ()),
        (Any(), {"x": A}, (), {"x": A}, ()),
        (KeywordOnly(), {"batch": A, "scale": B}, (), {"batch": A, "scale": B}, ()),
    ],
)
def test_a_tuple_is_spread_and_a_dict_names_arguments(model, inputs, positional, by_keyword, names):
    assert arguments(model, inputs) == (positional, by_keyword)
    assert argument_names(model, inputs) == names


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Two(), (A, B, C)),  # too many
        (Two(), {"picture": A}),  # another name
        (Two(), {"table": A}),  # `image` has no default
        (torch.nn.Identity(), (A, B)),
        (torch.nn.Identity(), {"x": A}),
        (KeywordOnly(), (A, B)),
        (Two(), {3: A}),
    ],
)
def test_what_the_signature_does_not_accept_is_the_only_argument(model, inputs):
    assert arguments(model, inputs) == ((inputs,), {})
    assert argument_names(model, inputs) == ()


def test_call_gives_the_models_outputs():
    assert call(Two(), (A, B)) == (A, B)
    assert call(torch.nn.Identity(), {"x": A}) == {"x": A}
    assert call(torch.nn.Flatten(), A) is not None
