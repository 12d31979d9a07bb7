"""How a process tells another one's death from its own failure; the processes run in test_site and in test_join."""

from __future__ import annotations

from edge_agent.training.site_worker import is_peer_lost
from edgefl.errors import TaskError

LOST = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:50885."


def test_a_lost_peer_is_known_by_its_cause():
    error = TaskError("task 't': local training raised RuntimeError")
    error.__cause__ = RuntimeError(LOST)
    assert is_peer_lost(error)
    assert not is_peer_lost(TaskError(LOST))  # only quoted
    assert not is_peer_lost(RuntimeError("no power"))
