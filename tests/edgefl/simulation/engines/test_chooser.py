"""Which way trains the next clients, by what the clients before took."""

import itertools

import pytest

from edgefl.simulation.engines.chooser import Chooser

SAMPLES = 10  # of each client


class Machine:
    """Ways with a speed of their own, in clients/s, that can change; and how many clients each has trained."""

    def __init__(self, start_s=None, limits=None, **speeds):
        self.speeds, self.clients = speeds, dict.fromkeys(speeds, 0)
        self.chooser = Chooser(tuple(speeds), start_s or {}, limits)
        self.seconds, self.parts = 0.0, []

    def round(self, cohort, later):
        left = cohort
        while left:
            way, count = self.chooser.next(left, later, cohort=cohort)
            assert 0 < count <= left
            self.parts.append((way, count))
            self.clients[way] += count
            seconds = count / self.speeds[way]
            self.seconds += seconds
            self.chooser.note(way, clients=count, samples=count * SAMPLES, seconds=seconds)
            left -= count

    def run(self, cohort, rounds):
        for number in range(rounds):
            self.round(cohort, (rounds - 1 - number) * cohort)


@pytest.mark.parametrize("fastest", ["loop", "stacked", "pool"])
def test_the_fastest_trains_nearly_all(fastest):
    machine = Machine(**dict.fromkeys(("loop", "stacked", "pool"), 100.0) | {fastest: 400.0})
    machine.run(cohort=1000, rounds=100)
    assert machine.chooser.best == fastest
    assert machine.clients[fastest] > 0.9 * 100_000
    assert machine.seconds < 1.1 * 100_000 / 400


def test_a_short_run_is_trained_by_the_first_way():
    machine = Machine(loop=100.0, stacked=1e6)
    machine.run(cohort=5, rounds=3)
    assert machine.clients == {"loop": 15, "stacked": 0}


def test_a_trial_takes_parts_of_a_large_cohort():
    machine = Machine(loop=100.0, stacked=200.0)
    machine.round(1000, later=10_000)
    assert machine.parts[:8] == [("loop", 4), *[("loop", 25)] * 3, *[("stacked", 4)] * 2, *[("stacked", 25)] * 2]


def test_a_small_cohort_is_tried_whole():
    small = Machine(loop=100.0, stacked=200.0)
    small.run(cohort=90, rounds=30)
    assert small.parts[:3] == [("loop", 4), ("loop", 86), ("loop", 90)]
    assert [count for _, count in small.parts if count not in {4, 82, 86}] == [90] * (len(small.parts) - 5)
    assert small.chooser.best == "stacked"


def test_a_hopeless_way_is_left_after_its_warm_up():
    machine = Machine(loop=100.0, stacked=1.0)
    machine.run(cohort=1000, rounds=1)
    assert machine.clients["stacked"] == 2 * 4
    slow = Machine(loop=100.0, stacked=20.0)
    slow.run(cohort=1000, rounds=1)
    assert slow.clients["stacked"] == 2 * 4 + 2 * 25


def test_what_must_start_something_is_tried_only_if_enough_is_left():
    machine = Machine(start_s={"pool": 4.0}, loop=100.0, pool=400.0)
    machine.run(cohort=200, rounds=2)
    assert machine.clients["pool"] == 0
    assert "not pool: what is left takes about" in machine.chooser.reason()
    longer = Machine(start_s={"pool": 4.0}, loop=100.0, pool=400.0)
    longer.run(cohort=200, rounds=20)
    assert longer.chooser.best == "pool"


def test_a_way_that_cannot_be_faster_than_the_best_is_not_tried():
    machine = Machine(limits={"pool": ("loop", 2.0)}, loop=100.0, stacked=250.0, pool=200.0)
    machine.run(cohort=1000, rounds=50)
    assert machine.clients["pool"] == 0
    assert "not pool: it is at most 2 times as fast as loop" in machine.chooser.reason()
    faster = Machine(limits={"pool": ("loop", 4.0)}, loop=100.0, stacked=250.0, pool=390.0)
    faster.run(cohort=1000, rounds=50)
    assert faster.chooser.best == "pool"


def test_a_moments_load_at_the_start_does_not_decide_the_run():
    machine = Machine(loop=100.0, stacked=50.0)  # another program disturbs the stack's trial
    machine.round(1000, later=100_000)
    assert machine.chooser.best == "loop"
    machine.speeds["stacked"] = 400.0
    for later in range(100_000, 0, -1000):
        machine.round(1000, later)
    assert machine.chooser.best == "stacked"
    assert machine.clients["stacked"] > 80_000


def test_a_change_of_the_chosen_ways_speed_tries_the_others_soon():
    def clients_before_the_other(change):
        machine = Machine(loop=100.0, stacked=90.0)
        machine.round(1000, later=1_000_000)
        machine.speeds |= {"loop": 100.0 * change, "stacked": 400.0}
        before = machine.clients["loop"]
        for _ in itertools.takewhile(lambda _: machine.chooser.best == "loop", range(1000)):
            machine.round(100, later=1_000_000)
        return (machine.clients["loop"] - before) / machine.speeds["loop"]  # seconds

    assert clients_before_the_other(0.4) < clients_before_the_other(1.0)
    assert clients_before_the_other(2.0) < clients_before_the_other(1.0)


def test_a_way_that_is_ruled_out_is_never_used_again():
    machine = Machine(loop=100.0, stacked=400.0, pool=200.0)
    machine.run(cohort=1000, rounds=5)
    machine.chooser.rule_out("stacked", "it failed")
    assert machine.chooser.best == "pool"
    before = machine.clients["stacked"]
    machine.run(cohort=1000, rounds=50)
    assert machine.clients["stacked"] == before
    assert "not stacked: it failed" in machine.chooser.reason()


def test_a_way_that_fails_in_its_trial_ends_the_trial():
    machine = Machine(loop=100.0, stacked=400.0)
    machine.round(104, later=10_000)
    while machine.chooser.trying != "stacked":
        machine.round(30, later=10_000)
    machine.chooser.rule_out("stacked", "it failed")
    assert machine.chooser.next(30, 10_000, cohort=30) == ("loop", 30)


def test_clients_of_different_sizes_are_compared_by_their_samples():
    chooser = Chooser(("loop", "stacked"), {})
    sizes = itertools.cycle([1, 1000])  # samples of the clients in each part
    for _ in range(40):
        way, count = chooser.next(4, 1_000_000, cohort=4)
        samples = count * next(sizes)
        chooser.note(way, clients=count, samples=samples, seconds=samples / {"loop": 100, "stacked": 200}[way])
    assert chooser.best == "stacked"


def test_a_part_in_which_every_client_failed_measures_nothing():
    chooser = Chooser(("loop", "stacked"), {})
    for _ in range(10):
        assert chooser.next(4, 1000, cohort=4) == ("loop", 4)
        chooser.note("loop", clients=4, samples=0, seconds=0.1)
    assert chooser.trying == "loop"


def test_a_cohort_that_is_not_to_be_divided_is_tried_whole():
    chooser = Chooser(("loop", "stacked"), {})
    assert chooser.next(1000, 1000, cohort=1000, whole=True) == ("loop", 1000)


def test_the_reason_has_every_rate_the_fastest_first():
    machine = Machine(loop=100.0, stacked=400.0)
    machine.run(cohort=1000, rounds=3)
    assert machine.chooser.reason() == "measured on the run's own clients: stacked 400 clients/s, loop 100 clients/s"
