"""The fields of select expressions, and how values are shown."""

from __future__ import annotations

import pytest

from edgefl.choosing.facts import FIELDS, known_text, shown, type_of
from edgefl.protocols.messages import Telemetry


def test_each_field_has_a_type_and_is_named():
    assert all(type_of(name) is kind for name, kind in FIELDS.items())
    assert (type_of("tag.site"), type_of("tag"), type_of("memory")) == (str, None, None)
    assert all(name in known_text() for name in [*FIELDS, "tag.NAME"])


def test_reported_fields_are_those_of_telemetry():
    assert {"cpu_count", "cpu_percent", "battery_percent", "on_mains"} <= set(Telemetry.__dataclass_fields__)


@pytest.mark.parametrize(("value", "text"), [(None, "not known"), (True, "true"), (600.0, "600"), ("a", "'a'")])
def test_values_are_shown_as_they_are_written(value, text):
    assert shown(value) == text
