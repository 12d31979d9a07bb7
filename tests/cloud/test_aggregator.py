"""The cloud in this very process, with a real agent: how far it is from a command to the averaging line."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import sqlite3
import ssl
import sys
import threading
import traceback
from asyncio import sslproto
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from cloud.aggregator import TLS_BUFFER_BYTES, Aggregator, shrink_tls_buffers
from cloud.state.home import AggregatorOptions, CloudHome
from edgefl import aggregation
from edgefl.aggregation import WeightedMean, mean
from edgefl.app import cli
from edgefl.config import JobConfig, load_config
from edgefl.errors import HomeError, JobFailed, PartFailed, ProcessFailed
from edgefl.local_fleet import LocalFleet, free_ports
from edgefl.operator.run import run

ROOT = Path(__file__).parents[2]
NUMBERS = ROOT / "tests" / "e2e" / "tasks" / "numbers"
MAX_FILES = 10


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
        with pytest.raises(JobFailed, match=r"a bug in edgefl.*OverflowError.*too large"):
            run(str(NUMBERS), cloud=fleet.url, config=config, credentials=fleet.credentials)
        failed.append(json.loads(fleet.command("jobs", "list", "--json", "-")))
        assert run(str(NUMBERS), cloud=fleet.url, config=config, credentials=fleet.credentials).rounds

    with LocalFleet(tmp_path) as fleet:
        serve_while(fleet, work)
    assert failed[0][0]["state"] == "failed"


def test_a_job_that_an_older_version_took_and_cannot_run_is_failed_at_the_start(tmp_path):
    def work():
        with pytest.raises(ProcessFailed, match=r"train\.seed=-1 must be 0 or more"):
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
    supervisor = aggregator.home.supervisor

    def ready(_url):
        assert set(supervisor.reasons()) >= {"link", "broker", "database", "disk", "grpc", "jobs"}
        threading.Thread(target=supervisor.report_failure, args=("link", ZeroDivisionError("by zero"))).start()

    with pytest.raises(PartFailed, match=r"a part failed: link, ZeroDivisionError\('by zero'\)"):
        aggregator.serve(ready)
    assert not [one for one in threading.enumerate() if one.name in {"broker", "mqtt-cloud", "mqtt-inbox"}]


def our_files() -> list[str]:
    """Return the files of ours on this thread's stack, outermost first, each once."""
    frames = [Path(frame.filename) for frame in traceback.extract_stack()]
    ours = [str(one.relative_to(ROOT)) for one in frames if one.is_relative_to(ROOT) and ".venv" not in one.parts]
    return list(dict.fromkeys(one for one in ours if not one.startswith("tests/")))


def test_from_the_command_to_the_averaging_line(tmp_path, monkeypatch):
    """The command asks the cloud over HTTPS for a job; the request hands it to a thread; that runs the rounds.

    These are all the stacks there are between the two lines: each is noted where the next one begins.
    """
    asked: list[list[str]] = []
    handed: list[list[str]] = []
    averaged: list[list[str]] = []
    request, submit, blocks = httpx.Client.request, ThreadPoolExecutor.submit, mean.blocks

    def noted_request(client, method, url, **more):
        if (method, url) == ("POST", "/v1/jobs"):
            asked.append(our_files())
        return request(client, method, url, **more)

    def noted_submit(pool, work, *arguments, **more):
        if getattr(work, "__func__", None) is Aggregator.run_job:
            handed.append(our_files())
        return submit(pool, work, *arguments, **more)

    def noted_blocks(size):
        if sys._getframe(1).f_code.co_name == "add":  # which goes through the blocks with `total += weight * delta`
            averaged.append(our_files())
        return blocks(size)

    monkeypatch.setattr(httpx.Client, "request", noted_request)
    monkeypatch.setattr(ThreadPoolExecutor, "submit", noted_submit)
    monkeypatch.setattr(mean, "blocks", noted_blocks)

    def work():
        fleet.enroll("a")
        data = ("--data", "delta=2", "--data", "weight=1", "--data", f"calls={tmp_path / 'a.calls'}")
        fleet.start_agent("a", *data).wait_for("mqtt.up")
        words = ["run", str(NUMBERS), "--credentials", str(fleet.credentials), "--rounds", "1"]
        monkeypatch.setattr(sys, "argv", ["edgefl", *words, "--out", str(tmp_path / "model.safetensors")])
        with pytest.raises(SystemExit, match="0"):
            cli.main()

    with LocalFleet(tmp_path) as fleet:
        serve_while(fleet, work)
    assert (tmp_path / "model.safetensors").exists()
    command, in_the_cloud, in_the_job = asked[0], handed[0], averaged[0]
    path = list(dict.fromkeys([*command, *in_the_cloud, *in_the_job]))
    assert path[0] == "edgefl/app/cli.py"
    assert path[-1] == "edgefl/aggregation/mean.py"
    assert len(path) <= MAX_FILES, path
    told = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    assert [one for one in path if one not in told.partition("## The interfaces")[0]] == []
