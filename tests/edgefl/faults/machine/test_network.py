"""Wires keep the order of what they carry, cuts delay it or break them, and both ends hear of a loss."""

from __future__ import annotations

import pytest

from edgefl.faults.machine import threads
from edgefl.faults.machine.kernel import Kernel, Node
from edgefl.faults.machine.network import CONNECT_S, SILENCE_S, Network


@pytest.fixture
def net(tmp_path):
    kernel = Kernel(2)
    threads.enter(kernel)
    network = Network(kernel)
    network.client, network.server = Node(kernel, "c", tmp_path), Node(kernel, "s", tmp_path)
    network.listen("grpc", 1, network.server, "the server")
    yield network
    threads.leave()
    kernel.close()


def connected(net, port=1):
    found = []
    net.connect("grpc", net.client, port, lambda wire, server: found.append((wire, server)))
    net.kernel.run(lambda: bool(found), 100.0)
    return found[0]


def test_a_wire_keeps_the_order(net):
    wire, server = connected(net)
    assert server == "the server"
    seen = []
    for number in range(50):
        wire.to_server(lambda number=number: seen.append(number))
    net.kernel.run(lambda: False, 100.0)
    assert seen == list(range(50))
    assert net.num_messages == 50


def test_nobody_listens_at_another_port(net):
    assert connected(net, port=2) == (None, None)


def test_a_killed_node_no_longer_listens(net):
    net.kernel.kill(net.server)
    assert connected(net) == (None, None)


def test_a_short_cut_delays_what_a_wire_carries(net):
    wire, _ = connected(net)
    seen = []
    net.cut("c", "s", net.kernel.now_s + 5)
    wire.to_client(lambda: seen.append(net.kernel.now_s))
    net.kernel.run(lambda: False, 100.0)
    assert 5.0 < seen[0] < 6.0


def test_a_long_cut_breaks_the_wire_and_each_end_hears_of_it(net):
    wire, _ = connected(net)
    seen = []
    wire.when_lost(lambda: seen.append(("client", net.kernel.now_s)), at_server=False)
    wire.when_lost(lambda: seen.append(("server", net.kernel.now_s)), at_server=True)
    net.cut("c", "s", net.kernel.now_s + 2 * SILENCE_S)
    wire.to_server(lambda: seen.append(("arrived", 0)))
    net.kernel.run(lambda: False, 100.0)
    assert sorted(name for name, _ in seen) == ["client", "server"]
    assert all(SILENCE_S / 2 <= at_s <= SILENCE_S + 1 for _, at_s in seen)


def test_a_connection_over_a_cut_link_fails_in_time(net):
    net.cut("c", "s", 60.0)
    assert connected(net) == (None, None)
    assert net.kernel.now_s == CONNECT_S


def test_a_reset_loses_what_is_under_way_and_is_told_once(net):
    wire, _ = connected(net)
    seen = []
    undo = wire.when_lost(lambda: seen.append("undone"), at_server=False)
    undo()
    wire.when_lost(lambda: seen.append("lost"), at_server=False)
    wire.to_client(lambda: seen.append("arrived"))
    net.break_link("c", "s")
    net.break_link("c", "s")
    net.kernel.run(lambda: False, 100.0)
    assert seen == ["lost"]


def test_the_end_of_a_node_is_heard_at_once_or_late(net):
    for unnoticed, most_s in ((False, 0.2), (True, SILENCE_S)):
        wire, _ = connected(net)
        seen, begin_s = [], net.kernel.now_s
        wire.when_lost(lambda seen=seen: seen.append(net.kernel.now_s), at_server=False)
        net.end_of(net.server, unnoticed=unnoticed)
        net.kernel.run(lambda: False, begin_s + 100)
        assert most_s / 100 <= seen[0] - begin_s <= most_s or not unnoticed
        assert seen[0] - begin_s <= most_s
