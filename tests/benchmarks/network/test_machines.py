"""Machines reach each other over the switch, whose links delay, lose and are cut; nothing is left of them."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time

import psutil
import pytest

from benchmarks.network.machines import Machines, why_not


@pytest.fixture
def machines():
    if reason := why_not():
        pytest.skip(reason)
    with Machines(["a", "b"], seed=3) as machines:
        yield machines


@pytest.fixture
def ends(machines):
    """Two UDP sockets: one on each machine; the first is connected to the second."""
    with machines["b"].inside():
        there = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with machines["a"].inside():
        here = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with here, there:
        there.bind((machines["b"].address, 7000))
        there.settimeout(10)
        here.connect((machines["b"].address, 7000))
        send(here, there, 1)  # each has learnt the other's address
        yield here, there


def send(here, there, count):
    """Send so many datagrams; return those that arrive, before there is none for a while."""
    for number in range(count):
        here.send(b"%d" % number)
    there.settimeout(2.0)
    seen = []
    with contextlib.suppress(TimeoutError):
        while len(seen) < count:
            seen.append(int(there.recv(100)))
    return seen


def test_a_good_link_loses_nothing_and_keeps_the_order(ends):
    assert send(*ends, 50) == list(range(50))


def test_a_link_loses_some_frames(machines, ends):
    machines.set_link("b", loss=0.5)
    assert 0 < len(send(*ends, 200)) < 200


def test_nothing_passes_a_cut_link_until_it_is_whole_again(machines, ends):
    machines.set_link("a", cut=True)
    assert send(*ends, 5) == []
    machines.set_link("a", cut=False)
    assert send(*ends, 5) == list(range(5))


def test_a_link_that_is_bad_for_a_while_is_as_usual_then(machines, ends):
    machines.set_link("a", delay_s=0.001, loss=0.0)
    machines.set_link("a", cut=True, loss=1.0, for_s=1.0)
    assert send(*ends, 3) == []  # it waits for longer than that
    assert send(*ends, 3) == list(range(3))


def test_a_frame_is_delayed_by_both_links(machines, ends):
    machines.set_link("a", delay_s=0.1)
    machines.set_link("b", delay_s=0.2)
    here, there = ends
    begin_s = time.monotonic()
    here.send(b"x")
    there.recv(100)
    assert time.monotonic() - begin_s > 0.29


def test_what_runs_on_a_machine_is_seen_and_ends_with_it():
    if reason := why_not():
        pytest.skip(reason)
    with Machines(["a"]) as machines:
        process = subprocess.Popen(machines["a"].command(["sleep", "60"]))
        while psutil.Process(process.pid).name() != "sleep":
            time.sleep(0.01)
        assert [one.pid for one in machines.processes()["a"]] == [process.pid]
    assert process.wait(10) == -9
