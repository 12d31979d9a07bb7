"""Select expressions: what they mean, and everything that is refused before any device is asked."""

from __future__ import annotations

import pytest

from edgefl.choosing.expression import MAX_DEPTH, parse
from edgefl.config import JobConfig, from_dict
from edgefl.errors import ConfigError

DEVICE = {
    "name": "cam-3", "tag.site": "plant-3", "tag.my site": "x", "mem_mb": 600.0, "samples": None, "on_mains": True,
    "loss": 0.5, "cpu_percent": None,
}  # fmt: skip


def why_not(text: str, **changes: object) -> str:
    return parse(text).why_not({**DEVICE, **changes}.get)


@pytest.mark.parametrize(
    "text",
    [
        "mem_mb >= 512 and tag.site == 'plant-3'",
        "mem_mb >= 512 and tag.site == 'plant-3' and samples > 100",  # nothing is known of its samples yet
        "name in ('cam-1', 'cam-3')",
        "name not in ['cam-1']",
        "'plant' in tag.site",
        "tag['my site'] == 'x' and not false",
        "500 < mem_mb < 700",
        "-1 < loss",
        "on_mains and true",
        "not (mem_mb < 512 or tag.site != 'plant-3')",
        "cpu_percent < 50 or on_mains",  # known to be true, whatever the other is
    ],
)
def test_a_device_that_meets_it(text):
    assert why_not(text) == ""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("mem_mb >= 1024", "mem_mb is 600"),
        ("mem_mb >= 1024 and tag.site == 'plant-3'", "mem_mb is 600, tag.site is 'plant-3'"),
        ("not on_mains", "on_mains is true"),
        ("cpu_percent < 50", "it has not reported cpu_percent"),
        ("samples > 100 and loss > 1", "samples is not known, loss is 0.5"),
        ("false", "the expression is false for every device"),
    ],
)
def test_why_a_device_does_not_meet_it(text, reason):
    assert why_not(text) == reason


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("open('/etc/passwd')", r"`open\('/etc/passwd'\)` is a call; nothing is called"),
        ("name.upper() == 'A'", "is a call"),
        ("memory > 1", r"no field 'memory'. Known are: name, tag.NAME, mem_mb"),
        ("tag == 'a'", "no field 'tag'"),
        ("mem_mb > 'a'", "`mem_mb` is a number and `'a'` is a text; > compares two of a kind"),
        ("samples in (1, 'a')", "`in` compares two of a kind"),
        ("name in 5", "`in` needs a list"),
        ("on_mains < true", "< does not compare true and false"),
        ("samples", "`samples` is a number; expected a condition"),
        ("not name", "`name` is a text; expected a condition"),
        ("mem_mb + 1 > 2", "is not allowed. Allowed are numbers"),
        ("10 ** 10 > samples", "is not allowed"),
        ("1 if on_mains else 2", "is not allowed"),
        ("lambda: true", "is not allowed"),
        ("f'{name}' == name", "is not allowed"),
        ("[name for name in (1,)]", "is not allowed"),
        ("tag.a.b == 'x'", "is not allowed"),
        ("name == b'x'", "is not allowed"),
        ("name is 'x'", "`is` is not allowed"),
        ("1 < samples in (1, 2)", "compares twice"),
        ("1e999 > samples", "too large"),
        ("samples >", "cannot be read"),
        ("(" * 300 + "on_mains" + ")" * 300, "cannot be read"),
        ("not " * (MAX_DEPTH + 1) + "on_mains", "nested more than 20 deep"),
        ("not " * 990 + "on_mains", "nested more than 20 deep"),
        (" and ".join(["on_mains"] * 10_000), r"it has 129995 characters; at most 4000"),
        ("or".join([" 1<2 "] * 500), "more than 100 terms"),
        ("name == '\\n'", "backslash"),
        ("on_mains\n", "control character"),
    ],
)
def test_what_is_refused_in_words(text, complaint):
    with pytest.raises(ConfigError, match=complaint):
        parse(text)
    with pytest.raises(ConfigError, match=complaint):  # before work, with the configuration
        from_dict(JobConfig, {"rounds": {"select": text}})
