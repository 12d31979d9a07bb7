"""Topics: names that are safe, topics as published, and who may use which."""

from __future__ import annotations

import pytest

from edgefl.errors import ProtocolError
from edgefl.protocols import topics


def test_topics_by_hand() -> None:
    assert topics.up("pi-4", "state") == "edgefl/v1/up/pi-4/state"
    assert topics.down("pi-4", "job") == "edgefl/v1/down/pi-4/job"


@pytest.mark.parametrize("kind", topics.UP_KINDS)
def test_an_up_topic_comes_back(kind: str) -> None:
    assert topics.parse_up(topics.up("pi-4", kind)) == ("pi-4", kind)


@pytest.mark.parametrize(
    "topic",
    [
        "", "edgefl/v1/up/a", "edgefl/v1/up/a/party", "edgefl/v1/up/a/state/x", "edgefl/v1/down/a/job",
        "edgefl/v2/up/a/state", "x/edgefl/v1/up/a/state", "edgefl/v1/up/a/b/state",
    ],
)  # fmt: skip
def test_no_other_topic_is_an_up_topic(topic: str) -> None:
    with pytest.raises(ProtocolError, match=r"is not edgefl/v1/up/<device>/<state\|rollout\|telemetry>"):
        topics.parse_up(topic)


@pytest.mark.parametrize("name", ["a", "0", "pi-4", "site.b_2", "x" * 64])
def test_good_device_names(name: str) -> None:
    assert topics.valid_device_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "", "A", "a/b", "a+b", "+", "#", "a#", "$sys", "a b", "a\n", "\na", "é", "-a", "a-", ".", "..", "a\0",
        "x" * 65, "cloud", "all", "operator",
    ],
)  # fmt: skip
def test_bad_device_names(name: str) -> None:
    assert not topics.valid_device_name(name)


@pytest.mark.parametrize("kind", topics.UP_KINDS)
def test_a_device_publishes_on_its_own_topics(kind: str) -> None:
    assert topics.allowed("a", topics.up("a", kind), publish=True)


@pytest.mark.parametrize("topic", ["edgefl/v1/down/a/job", "edgefl/v1/down/a/#", "edgefl/v1/down/a/+"])
def test_a_device_reads_what_is_meant_for_it(topic: str) -> None:
    assert topics.allowed("a", topic, publish=False)


@pytest.mark.parametrize(
    ("topic", "publish"),
    [
        ("edgefl/v1/up/b/state", True),
        ("edgefl/v1/up/a/party", True),
        ("edgefl/v1/all/#", False),
        ("edgefl/v1/up/a/state/x", True),
        ("edgefl/v1/up/ab/state", True),
        ("edgefl/v1/down/a/job", True),
        ("edgefl/v1/all/round", True),
        ("$SYS/broker", True),
        ("edgefl/v1/down/b/job", False),
        ("edgefl/v1/down/ab/job", False),
        ("edgefl/v1/down/+/job", False),
        ("edgefl/v1/down/#", False),
        ("edgefl/v1/up/a/state", False),
        ("edgefl/v1/up/#", False),
        ("edgefl/v1/#", False),
        ("edgefl/#", False),
        ("edgefl/+/down/a/job", False),
        ("+/v1/down/a/job", False),
        ("#", False),
        ("$SYS/#", False),
    ],
)
def test_a_device_may_do_nothing_else(topic: str, publish: bool) -> None:
    assert not topics.allowed("a", topic, publish=publish)


def test_the_cloud_may_do_everything_of_ours() -> None:
    assert topics.allowed("cloud", topics.EVERY_UP, publish=False)
    assert topics.allowed("cloud", topics.down("a", "job"), publish=True)
    assert not topics.allowed("cloud", "$SYS/#", publish=False)
    assert not topics.allowed("", topics.up("a", "state"), publish=True)
