"""Who has to go: by hand, with a clock that is turned by hand."""

import pytest

from edgefl.errors import ConfigError
from edgefl.protocols.ports.connections import MAX_LEAVING, ConnectionLimits, Connections, source_of


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


def table(clock=None, **limits):
    usual = {"max_open": 10, "max_waiting": 3, "waiting_s": 5.0}
    return Connections(ConnectionLimits(**{**usual, **limits}), clock or Clock())


def fill(held, closed, *names):
    """Add connections; a name is source/number."""
    return {
        name: held.add(name.partition("/")[0], lambda reason, name=name: closed.append((name, reason)))
        for name in names
    }


def test_the_oldest_of_the_source_with_the_most_goes_first():
    held, closed = table(), []
    fill(held, closed, "device/1", "stranger/1", "stranger/2", "stranger/3", "stranger/4")
    assert [name for name, _ in closed] == ["stranger/1", "stranger/2"]
    assert (held.num_waiting, len(held)) == (3, 5)  # two are not closed yet


def test_settled_connections_are_not_closed_for_others():
    held, closed = table(max_open=3), []
    places = fill(held, closed, "a/1", "a/2", "a/3")
    for one in places.values():
        one.serve()
    assert fill(held, closed, "b/1") == {"b/1": None}
    assert closed == []
    places["a/2"].leave()
    assert fill(held, closed, "b/1")["b/1"] is not None


def test_a_full_port_takes_a_new_one_for_an_idle_one():
    held, closed = table(max_open=3), []
    places = fill(held, closed, "a/1", "a/2", "a/3")
    for one in places.values():
        one.serve()
    places["a/2"].wait()
    assert fill(held, closed, "b/1")["b/1"] is not None
    assert closed == [("a/2", "others need the place")]


def test_what_is_owed_has_a_deadline_that_work_of_ours_does_not():
    clock, closed = Clock(), []
    held = table(clock)
    places = fill(held, closed, "a/1", "a/2")
    places["a/1"].serve()
    clock.now_s = 4.9
    assert held.close_overdue() == 0
    clock.now_s = 5.0
    assert held.close_overdue() == 1
    assert closed == [("a/2", "nothing came in time")]
    clock.now_s = 1000.0
    assert held.close_overdue() == 0
    places["a/1"].wait(2.0)
    clock.now_s = 1002.0
    assert held.close_overdue() == 1


def test_one_that_waits_again_is_the_youngest():
    held, closed = table(), []
    places = fill(held, closed, "a/1", "a/2", "a/3")
    places["a/1"].serve()
    places["a/1"].wait()
    fill(held, closed, "a/4")
    assert [name for name, _ in closed] == ["a/2"]


def test_nothing_is_closed_twice_and_leaving_may_be_said_again():
    held, closed = table(max_waiting=1), []
    first = fill(held, closed, "a/1")["a/1"]
    fill(held, closed, "a/2")
    first.wait()  # a late word of one that was told to close
    fill(held, closed, "a/3")
    assert [name for name, _ in closed] == ["a/1", "a/2"]
    first.leave()
    first.leave()
    assert len(held) == 2


def test_connections_that_do_not_close_are_not_added_to_for_ever():
    held, closed = table(max_open=5), []
    fill(held, closed, *(f"a/{number}" for number in range(1000)))
    assert len(held) <= 5 + MAX_LEAVING


def test_by_law_the_counts_are_right_after_anything():
    held, closed = table(), []
    places = [one for one in fill(held, closed, *(f"{n % 3}/{n}" for n in range(20))).values() if one]
    for number, one in enumerate(places):
        (one.serve, one.wait, one.leave)[number % 3]()
    for one in places:
        one.leave()
    assert (len(held), held.num_waiting, held.evict()) == (0, 0, False)


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("", ""),
    ],
)
def test_a_source_is_an_address_or_its_network(address, source):
    assert source_of(address) == source


@pytest.mark.parametrize("wrong", [{"max_waiting": 0}, {"max_waiting": 11}, {"waiting_s": 0}])
def test_limits_that_let_nobody_in_are_refused(wrong):
    with pytest.raises(ConfigError, match="expected 0 < max_waiting"):
        table(**wrong)


def test_many_that_are_leaving_are_a_crowd_until_they_have_left():
    held, closed = table(max_open=200, max_waiting=3), []
    places = fill(held, closed, *(f"a/{number}" for number in range(3 + MAX_LEAVING // 2)))
    assert held.is_crowded
    places["a/0"].leave()
    assert not held.is_crowded
