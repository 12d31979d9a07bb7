"""What torchrun is called with; it runs in test_site and in test_join."""

from __future__ import annotations

import os

from edge_agent.training.site import SiteSettings
from edge_agent.training.site_launcher import arguments_of, environment_of


def test_one_machine_meets_in_a_file_and_talks_on_loopback(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    settings = SiteSettings(folder="/f", processes=2)
    arguments = arguments_of(settings, settings.address)
    assert {"--nnodes=1", "--nproc-per-node=2", "--rdzv-endpoint=/f/rendezvous"} <= {*arguments}
    assert "--local-addr=127.0.0.1" in arguments
    assert any(one.startswith("--rdzv-conf=store_type=file") for one in arguments)
    environment = environment_of(settings, settings.address)
    assert environment["GLOO_SOCKET_IFNAME"] == "lo"
    assert "OMP_NUM_THREADS" not in environment  # the user's own stays


def test_several_machines_meet_at_the_agents(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    agents = SiteSettings(folder="/f", processes=2, rendezvous="127.0.0.1:29400", machines=3)
    other = SiteSettings(folder="/f", processes=1, rendezvous="127.0.0.1:29400", machines=3, leads=False)
    for settings, is_host in ((agents, 1), (other, 0)):
        arguments = arguments_of(settings, "127.0.0.1")
        assert {"--nnodes=3", "--rdzv-endpoint=127.0.0.1:29400"} <= {*arguments}
        assert any(one.startswith(f"--rdzv-conf=is_host={is_host},") for one in arguments)
    cores = len(os.sched_getaffinity(0))
    assert environment_of(other, "127.0.0.1")["OMP_NUM_THREADS"] == str(cores)
