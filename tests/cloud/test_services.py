"""The seams of the HTTPS plane: the real jobs and link fit them."""

from __future__ import annotations

import inspect

import pytest

from cloud import services
from cloud.jobs import Jobs
from cloud.mqtt_link import CloudLink


@pytest.mark.parametrize(("seam", "part"), [(services.JobService, Jobs), (services.Link, CloudLink)])
def test_the_real_part_has_what_the_seam_asks(seam, part):
    for name, wanted in inspect.getmembers(seam, inspect.isfunction):
        if not name.startswith("_"):
            assert list(inspect.signature(wanted).parameters) == list(inspect.signature(getattr(part, name)).parameters)
