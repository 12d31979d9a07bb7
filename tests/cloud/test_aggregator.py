"""The cloud in this very process, with a real agent: how far it is from a command to the averaging line."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import sqlite3
import ssl
import threading
from asyncio import sslproto
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from cloud.aggregator import TLS_BUFFER_BYTES, Aggregator, shrink_tls_buffers
from cloud.state.home import AggregatorOptions, CloudHome
from edgefl import aggregation
from edgefl.aggregation import WeightedMean
from edgefl.app.local_fleet import LocalFleet, free_ports
from edgefl.config import JobConfig, load_config
from edgefl.errors import CloudUnreachable, HomeError, JobFailed, PartFailed
from edgefl.operator.run import run

ROOT = Path(__file__).parents[2]
NUMBERS = ROOT / "tests" / "e2e" / "tasks" / "numbers"


class Ready(logging.Handler):
    """Tells when the cloud serves."""

    def __init__(self):
        super().__init__()
        self.event = threading.Event()

    def emit(self, record):
        if record.getMessage().startswith("cloud.ready"):
            self.event.set()


def serve_while(fleet, work):
    """Serve in this thread, as signals need, while `work` runs in another; then stop by SIGTERM."""
    ready = Ready()
    logger = logging.getLogger("cloud.aggregator")
    logger.addHandler(ready)
    logger.setLevel(logging.INFO)

    def operate():
        assert ready.event.wait(20)
        work()

    options = AggregatorOptions(
        home=fleet.home, grpc_port=fleet.grpc_port, http_port=fleet.http_port, mqtt_port=fleet.mqtt_port
    )
    try:
        with ThreadPoolExecutor(1) as pool:
            operated = pool.submit(operate)
            operated.add_done_callback(lambda _: os.kill(os.getpid(), signal.SIGTERM))
            Aggregator(options).serve()
    finally:
        logger.removeHandler(ready)
    operated.result(0)


def test_a_defect_of_ours_ends_its_job_with_a_reason_and_the_cloud_goes_on(tmp_path, monkeypatch):
    class Broken(WeightedMean):
        def add(self, update):
            if not failed:
                raise OverflowError("timeout value is too large")
            super().add(update)

    monkeypatch.setitem(aggregation.RULES, "mean", Broken)
    failed = []

    def work():
        fleet.enroll("a")
        data = ("--data", "delta=2", "--data", "weight=1", "--data", f"calls={tmp_path / 'a.calls'}")
        fleet.start_agent("a", *data).wait_for("mqtt.up")
        config = load_config(JobConfig, None, ["rounds.count=1"])
        with pytest.raises(JobFailed, match=r"a defect of edgefl.*OverflowError.*too large"):
            run(str(NUMBERS), cloud=fleet.url, config=config, credentials=fleet.credentials)
        failed.append(json.loads(fleet.command("jobs", "list", "--json", "-")))
        assert run(str(NUMBERS), cloud=fleet.url, config=config, credentials=fleet.credentials).rounds

    with LocalFleet(tmp_path) as fleet:
        serve_while(fleet, work)
    assert failed[0][0]["state"] == "failed"


def test_a_job_that_an_older_version_took_and_cannot_run_is_failed_at_the_start(tmp_path):
    def work():
        with pytest.raises(CloudUnreachable, match=r"train\.seed=-1 must be 0 or more"):
            fleet.command("jobs", "watch", job)

    with LocalFleet(tmp_path) as fleet:
        home = CloudHome(AggregatorOptions(home=fleet.home))
        with contextlib.ExitStack() as held:
            held.push(home)  # not entered: no broker; its lock is let go
            bundle, tree = home.blobs.put(b"zip"), home.blobs.put_tree({"w": np.zeros(1, np.float32)})
            job = home.jobs.submit("t:t", bundle, tree, (), JobConfig())
        with sqlite3.connect(fleet.home / "cloud.db") as db:
            db.execute("UPDATE jobs SET config = json_set(config, '$.train.seed', -1)")
        db.close()
        serve_while(fleet, work)


def test_a_second_cloud_on_the_same_home_or_port_is_refused(tmp_path):
    def work():
        same_home = AggregatorOptions(home=fleet.home, mqtt_port=1)
        with pytest.raises(HomeError, match="in use by process"):
            Aggregator(same_home)
        with LocalFleet(tmp_path) as spare:
            command = ["cloud", "start", "--home", str(tmp_path / "third"), "--grpc-port", str(fleet.grpc_port)]
            command += ["--http-port", str(spare.http_port), "--mqtt-port", str(spare.mqtt_port)]
            with pytest.raises(Exception, match=f"cannot listen on 127.0.0.1:{fleet.grpc_port}.*--grpc-port"):
                fleet.command(*command)

    with LocalFleet(tmp_path) as fleet:
        serve_while(fleet, work)


def test_tls_connections_read_into_small_buffers(monkeypatch):
    monkeypatch.setattr(sslproto.SSLProtocol, "max_size", sslproto.SSLProtocol.max_size)  # is put back, and is there
    shrink_tls_buffers()

    async def main():
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        made = sslproto.SSLProtocol(asyncio.get_running_loop(), asyncio.Protocol(), context, None, server_side=True)
        made._app_transport._closed = True  # it was never open
        return len(made._ssl_buffer)

    assert asyncio.run(main()) == TLS_BUFFER_BYTES


def test_a_part_that_ends_takes_the_process_with_it_and_is_named(tmp_path):
    grpc_port, http_port, mqtt_port = free_ports(3)
    options = AggregatorOptions(
        home=tmp_path / "cloud", grpc_port=grpc_port, http_port=http_port, mqtt_port=mqtt_port
    )  # fmt: skip
    aggregator = Aggregator(options)
    parts = aggregator._home.parts

    def ready(_url):
        assert set(parts.reasons()) >= {"link", "broker", "database", "disk", "grpc", "jobs"}
        threading.Thread(target=parts.ended, args=("link", ZeroDivisionError("by zero"))).start()

    with pytest.raises(PartFailed, match=r"a part of it did: link, ZeroDivisionError\('by zero'\)"):
        aggregator.serve(ready)
    assert not [one for one in threading.enumerate() if one.name in {"broker", "mqtt-cloud", "mqtt-inbox"}]
