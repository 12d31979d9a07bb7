"""Every combination of settings, as the command line says them."""

import pytest

from edgefl.errors import ConfigError
from edgefl.simulation.study.variants import Variant, parse_sweep, variants_of


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a.b=1,2.5", [1, 2.5]),
        ("a.b=SGD, Adam", ["SGD", "Adam"]),
        ("a.b=true,false", [True, False]),
        ("a.b={momentum=0.9, nesterov=true},{}", [{"momentum": 0.9, "nesterov": True}, {}]),
        ("a.b=[1,2],[3]", [[1, 2], [3]]),
        ("a.b='x,y',\"z\"", ["x,y", "z"]),
        ("a.b=7", [7]),
    ],
)
def test_values_are_read_as_a_setting_reads_them(text, values):
    assert parse_sweep([text]) == {"a.b": values}


@pytest.mark.parametrize("texts", [["a.b"], ["=1"], ["a.b="], ["a.b=1,,2"], ["a.b=1", "a.b=2"]])
def test_what_is_no_sweep_is_refused(texts):
    with pytest.raises(ConfigError, match="--sweep"):
        parse_sweep(texts)


def test_the_last_key_changes_fastest():
    names = [one.name for one in variants_of({"a": [1, 2], "b.c": ["x", True]})]
    assert names == ["a=1, b.c=x", "a=1, b.c=true", "a=2, b.c=x", "a=2, b.c=true"]
    assert variants_of({"a": [1]}) == [Variant({"a": 1})]


@pytest.mark.parametrize("values", [[], "12", [1, 2, 1]])
def test_lists_that_are_none_or_repeat(values):
    with pytest.raises(ConfigError, match="sweep over 'a'"):
        variants_of({"a": values})
