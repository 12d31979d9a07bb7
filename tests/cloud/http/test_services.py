"""The seams of the HTTPS plane: the real jobs and link fit them."""

from __future__ import annotations

import inspect

import pytest

from cloud.broker.link import DeviceLink
from cloud.http import services
from cloud.state.jobs import Jobs


@pytest.mark.parametrize(("seam", "part"), [(services.JobService, Jobs), (services.Link, DeviceLink)])
def test_the_real_part_has_what_the_seam_asks(seam, part):
    for name, wanted in inspect.getmembers(seam, inspect.isfunction):
        if not name.startswith("_"):
            assert list(inspect.signature(wanted).parameters) == list(inspect.signature(getattr(part, name)).parameters)
