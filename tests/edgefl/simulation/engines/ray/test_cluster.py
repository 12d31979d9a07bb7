"""A cluster of our own comes and goes without a trace; one that is not there is told at once."""

import os
import signal
import socket
from contextlib import closing
from pathlib import Path

import grpc
import psutil
import pytest

from edgefl.errors import ConfigError
from edgefl.measure import num_cores
from edgefl.simulation.engines.ray import cluster
from edgefl.simulation.engines.ray.cluster import Cluster


def programs(folder):
    """Return Ray's processes of one session."""
    return [one for one in psutil.process_iter(["cmdline"]) if folder in " ".join(one.info["cmdline"] or ())]


def test_one_of_our_own_obeys_its_token_alone_and_leaves_nothing(capfd):
    before = signal.getsignal(signal.SIGTERM)
    with closing(Cluster()) as cluster:
        assert (cluster.ours, cluster.num_cpus()) == (True, num_cores())
        assert signal.getsignal(signal.SIGTERM) is before
        assert os.environ["RAY_AUTH_MODE"] == "token"
        folder = cluster._folder
        assert len(programs(folder)) >= 2
        with grpc.insecure_channel(cluster.ray.get_runtime_context().gcs_address) as channel:
            check_alive = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
            with pytest.raises(grpc.RpcError) as refused:
                check_alive(b"", timeout=10)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(ConfigError, match="already connected to a Ray cluster"):
            Cluster("auto")
        with closing(Cluster()) as again:  # that of who called us
            assert not again.ours
        assert cluster.num_cpus() == num_cores()
    assert "RAY_AUTH_TOKEN" not in os.environ
    assert not Path(folder).exists()
    assert not programs(folder)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("address", ["ray://host:10001", "host", "host:port", ":6379", "https://host:6379"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(ConfigError, match="not of the form HOST:PORT"):
        Cluster(address)


def test_where_nobody_listens_there_is_no_cluster(free_port):
    with pytest.raises(ConfigError, match=r"no Ray cluster answers at .*refused"):
        Cluster(f"127.0.0.1:{free_port}")


def test_who_listens_and_says_nothing_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(cluster, "HEALTH_S", 2.0)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(ConfigError, match=r"within 2 s\. Start one with `ray start --head`"),
    ):
        Cluster(f"127.0.0.1:{silent.getsockname()[1]}")


def test_auto_is_not_waited_for_either(monkeypatch, free_port):
    monkeypatch.setattr(cluster, "HEALTH_S", 2.0)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port}")  # of one that has ended
    with pytest.raises(ConfigError, match="no Ray cluster answers at auto within 2 s"):
        Cluster("auto")
