"""Policies: what they allow, and those that can never hold."""

from __future__ import annotations

import pytest

from edge_agent.policy.rules import MachineState, parse_policy, refuse_never_true
from edgefl.errors import ConfigError


def state(**changes):
    return MachineState(
        **{"busy_percent": 5.0, "on_mains": True, "metered": False, "minute": 12 * 60, "unknown": {}} | changes
    )


@pytest.mark.parametrize(
    ("policy", "changes", "codes"),
    [
        ("idle,charging,unmetered", {}, {}),
        ("idle", {"busy_percent": 60.0}, {"not-idle": "other programs use 60% of the processors"}),
        ("charging", {"on_mains": False}, {"not-charging": "it runs on its battery"}),
        ("unmetered", {"metered": True}, {"metered": "the network is paid by volume"}),
        ("22:00-06:00", {}, {"outside-hours": "it is 12:00, not 22:00-06:00"}),
        ("22:00-06:00", {"minute": 23 * 60}, {}),
        ("22:00-06:00", {"minute": 6 * 60}, {"outside-hours": "it is 06:00, not 22:00-06:00"}),
        ("08:00-18:00, 12:00-13:00", {}, {}),
        ("idle", {"busy_percent": None, "unknown": {"idle": "no time"}}, {"idle-unknown": "no time"}),
        ("charging", {"metered": True, "unknown": {"unmetered": "x"}}, {}),
    ],
)
def test_what_a_policy_refuses(policy, changes, codes):
    assert parse_policy(policy).refusals(state(**changes)) == codes


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("idel", "'idel' is not one of idle, charging, unmetered, or hours such as 22:00-06:00"),
        ("24:00-06:00", "is not one of"),
        ("idle,", "'' is not one of"),
        ("22:00-22:00", "never true: no minute of a day"),
        ("08:00-10:00,12:00-13:00", "never true: no minute of a day is in all of 08:00-10:00,12:00-13:00"),
        ("22:00-06:00,07:00-21:00", "never true"),
    ],
)
def test_what_cannot_be_read_or_never_holds_is_said_at_once(text, complaint):
    with pytest.raises(ConfigError, match=complaint):
        parse_policy(text)


def test_a_term_that_this_machine_cannot_judge_is_said_at_once():
    refuse_never_true(parse_policy("idle"), {"unmetered": "nobody says"})
    with pytest.raises(ConfigError, match="never true on this device: unmetered cannot be judged, because nobody says"):
        refuse_never_true(parse_policy("idle,unmetered"), {"unmetered": "nobody says"})
