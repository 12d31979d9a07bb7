"""What the page "What models work" says is so: each kind of model, measured through the whole cycle."""

import pytest

from edgefl.local_fleet import LocalFleet
from tests.kinds.kinds import KINDS
from tests.kinds.measured import measured, start_devices
from tests.kinds.page import PAGE, read


@pytest.fixture(scope="module")
def devices(tmp_path_factory):
    """A cloud and two devices, for all kinds."""
    with LocalFleet(tmp_path_factory.mktemp("fleet")) as fleet:
        start_devices(fleet)
        yield fleet


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_page_says_what_is_measured(devices, kind):
    if kind.cannot:
        pytest.skip(kind.cannot)
    assert measured(kind, devices) == read(PAGE.read_text("utf-8"))[kind.title]
