"""Rounds on the device, with a real trainer and a real cloud: what arrives there is what counts."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import io
import os
import signal

import numpy as np
import pytest
from blake3 import blake3

import edge_agent.training.trainer
from edge_agent.training.participant import MAX_TRIES
from edgefl.errors import HomeError
from edgefl.protocols.manifest import Bundle, new_fleet_key, sign, verify
from edgefl.protocols.messages import BlobRef, RoundClosed, UpdateRefused
from edgefl.trees import write_tree

TASK = """
    import os
    import time
    from pathlib import Path
    import numpy as np
    from edgefl import FitResult, Task

    def fit(parameters, config, options):
        mean = float(np.mean(parameters["w"]))
        with open(options["log"], "a") as log:
            log.write(f"{mean:g} ")
        if options.get("signal") and Path(options["log"]).read_text().count(" ") <= int(options["times"]):
            os.kill(os.getpid(), int(options["signal"]))
            time.sleep(60)
        if options.get("what") == "late":
            time.sleep(0.5)
        if options.get("what") in ("raise", "late"):
            raise RuntimeError("no data on this device")
        if options.get("what") == "hang" and mean == 1:
            time.sleep(60)
        return FitResult(tree={name: np.ones_like(value) for name, value in parameters.items()}, weight=1.0)

    task = Task(name="t", initial=dict, fit=fit)
"""


def test_rounds_follow_each_other_and_reuse_what_there_is(fleet, home, on_device):
    async def run(device):
        for number in (1, 2, 3):
            plan = fleet.plan(number, code=TASK)
            device.participant.handle(plan)
            await device.until(lambda number=number: ("j1", number) in fleet.updates and not device.store.outbox())
        assert device.fits() == "1 2 3"
        assert len([call for call in fleet.calls if call.startswith("download")]) == 4  # one bundle, three models
        assert len(list((home / "work").iterdir())) == 1
        assert [file.name for file in (home / "outbox").iterdir()] == ["spare"]
        device.participant.handle(RoundClosed(job="j1", round=3, job_ended=True))
        await device.until(lambda: not list((home / "work").iterdir()))
        assert list((home / "outbox").iterdir()) == []
        assert device.trainer.pid  # kept for the next job of this task

    on_device(run)


def test_a_plan_that_comes_twice_is_done_once(fleet, on_device):
    async def run(device):
        plan = fleet.plan(1, code=TASK)
        device.participant.handle(plan)
        device.participant.handle(plan)
        await device.until(lambda: ("j1", 1) in fleet.updates)
        device.participant.handle(plan)
        device.participant.reconcile([plan], None, 0)
        device.participant.handle(fleet.plan(2, code=TASK))
        await device.until(lambda: ("j1", 2) in fleet.updates)
        assert device.fits() == "1 2"

    on_device(run)


def test_a_newer_plan_replaces_the_one_at_work(fleet, on_device):
    async def run(device):
        device.participant.handle(fleet.plan(1, code=TASK))
        await device.until(lambda: device.fits() == "1")
        device.participant.handle(fleet.plan(2, code=TASK))
        await device.until(lambda: ("j1", 2) in fleet.updates)
        assert ("j1", 1) not in fleet.updates
        device.participant.handle(fleet.plans[0])  # the old one, late
        await asyncio.sleep(0.05)
        assert device.fits() == "1 2"

    # Of the older round nothing is said either: the cloud has moved on by itself.
    on_device(run, what="hang")
    assert fleet.failures == {}


def test_plans_of_other_jobs_wait_their_turn(fleet, on_device):
    async def run(device):
        for job in ("j1", "j2", "j3"):
            device.participant.handle(fleet.plan(5, job=job, code=TASK))
        await device.until(lambda: len(fleet.updates) == 3)

    on_device(run)


def test_a_closed_round_is_left(fleet, on_device):
    async def run(device):
        device.participant.handle(fleet.plan(1, code=TASK))
        await device.until(lambda: device.fits() == "1")
        device.participant.handle(RoundClosed(job="j1", round=1, job_ended=False))
        await device.until(lambda: device.participant.current is None)
        device.participant.handle(UpdateRefused(job="j1", round=1, reason="only to be logged"))
        device.participant.handle(fleet.plan(2, code=TASK))
        await device.until(lambda: ("j1", 2) in fleet.updates)

    on_device(run, what="hang")
    assert fleet.failures == {}


def test_a_closed_round_that_was_not_heard_of_is_noticed_by_next(fleet, on_device):
    async def run(device):
        plan = fleet.plan(1, code=TASK)
        device.participant.handle(plan)
        await device.until(lambda: device.fits() == "1")
        device.participant.reconcile([], None, 0)  # asked before it began: says nothing about it
        assert device.participant.current is plan
        device.participant.reconcile([], plan, 0)
        await device.until(lambda: device.participant.current is None)

    on_device(run, what="hang")


def test_a_fit_whose_trainer_the_machine_kills_is_done_again_and_its_update_arrives(fleet, on_device):
    async def run(device):
        device.participant.handle(fleet.plan(1, code=TASK))
        await device.until(lambda: ("j1", 1) in fleet.updates)
        assert device.fits() == "1 1 1"

    on_device(run, signal=str(int(signal.SIGKILL)), times="2")
    assert fleet.failures == {}


def test_a_trainer_that_is_killed_whenever_it_trains_is_given_up_with_the_reason(fleet, on_device):
    async def run(device):
        device.participant.handle(fleet.plan(1, code=TASK))
        await device.until(lambda: ("j1", 1) in fleet.failures)
        assert device.fits().split() == ["1"] * MAX_TRIES

    on_device(run, signal=str(int(signal.SIGKILL)), times="100")
    assert "the trainer was killed by SIGKILL (the system may have run out of memory)" in fleet.failures["j1", 1]


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGFPE, signal.SIGABRT])
def test_a_crash_of_the_tasks_own_is_not_tried_again(fleet, on_device, number):
    async def run(device):
        device.participant.handle(fleet.plan(1, code=TASK))
        await device.until(lambda: ("j1", 1) in fleet.failures)
        assert device.fits() == "1"

    on_device(run, signal=str(int(number)), times="100")
    assert f"killed by {number.name}" in fleet.failures["j1", 1]


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM])
def test_a_trainer_that_cannot_be_started_now_is_started_later(fleet, on_device, monkeypatch, number):
    refused = [OSError(number, os.strerror(number))] * 2
    start = edge_agent.training.trainer._popen

    def popen(descriptor):
        if refused:
            raise refused.pop()
        return start(descriptor)

    monkeypatch.setattr(edge_agent.training.trainer, "_popen", popen)

    async def run(device):
        device.participant.handle(fleet.plan(1, code=TASK))
        await device.until(lambda: ("j1", 1) in fleet.updates)

    on_device(run)
    assert not refused


def test_a_task_that_raises_is_reported_with_its_words(fleet, on_device):
    async def run(device):
        device.participant.handle(fleet.plan(1, code=TASK))
        await device.until(lambda: ("j1", 1) in fleet.failures and not device.store.failures())
        assert device.store.is_answered("j1", 1)

    on_device(run, what="raise")
    assert "fit raised RuntimeError: no data on this device" in fleet.failures["j1", 1]


def test_a_task_that_hangs_is_stopped_and_reported_before_the_deadline(fleet, on_device):
    async def run(device):
        device.participant.handle(fleet.plan(1, code=TASK, deadline_s=3))
        await device.until(lambda: ("j1", 1) in fleet.failures)

    on_device(run, what="hang")
    assert fleet.failures["j1", 1] == "stopped after 2.85 s, shortly before the round's deadline (3 s)"


@pytest.mark.parametrize(
    ("damage", "said"),
    [("signature", "the bundle is not signed by the fleet's key"), ("bytes", "does not match its hash"),
     ("zip", "is not a complete zip"), ("code", "fit_nothing"), ("attribute", "has no attribute 'task'")],
)  # fmt: skip
def test_a_bad_bundle_is_reported_and_nothing_runs(fleet, on_device, damage, said):
    bundle = fleet.bundle("fit_nothing" if damage == "code" else "" if damage == "attribute" else TASK)
    facts = verify(bundle, Bundle, fleet.key.public_key())
    if damage == "signature":
        bundle = sign(facts, new_fleet_key())
    if damage == "bytes":
        fleet.blobs[facts.blob.sha256] = bytes(facts.blob.size)
    if damage == "zip":
        bundle = sign(dataclasses.replace(facts, blob=fleet.blob(b"no zip at all")), fleet.key)

    async def run(device):
        device.participant.handle(fleet.plan(1, bundle=bundle))
        await device.until(lambda: ("j1", 1) in fleet.failures)
        assert device.fits() == ""

    on_device(run)
    assert said in fleet.failures["j1", 1]


@pytest.mark.parametrize(
    ("change", "said"),
    [({"max_update_bytes": 10}, "bytes; this round accepts at most 10"),
     ({"model": BlobRef(sha256="../../etc/passwd", size=10)}, "expected a SHA-256 in hex")],
)  # fmt: skip
def test_a_plan_that_cannot_be_done_is_reported(fleet, on_device, change, said):
    async def run(device):
        device.participant.handle(dataclasses.replace(fleet.plan(1, code=TASK, offer=False), **change))
        await device.until(lambda: ("j1", 1) in fleet.failures)

    on_device(run)
    assert said in fleet.failures["j1", 1]


def test_a_model_that_is_no_tree_is_reported(fleet, on_device):
    async def run(device):
        plan = fleet.plan(1, code=TASK, offer=False)
        device.participant.handle(
            dataclasses.replace(plan, model=fleet.blob(b"no tree"), model_blake3=blake3(b"no tree").hexdigest())
        )
        await device.until(lambda: ("j1", 1) in fleet.failures)

    on_device(run)
    assert "too short" in fleet.failures["j1", 1]


def test_a_model_that_changes_its_size_between_rounds(fleet, on_device):
    async def run(device):
        for number, size in ((1, 4), (2, 1000), (3, 1000), (4, 4)):
            device.participant.handle(fleet.plan(number, code=TASK, size=size))
            await device.until(lambda number=number: ("j1", number) in fleet.updates)
            assert np.all(fleet.tree("j1", number)["w"] == 1)
            assert fleet.tree("j1", number)["w"].size == size

    on_device(run)


def test_a_failure_waits_for_the_cloud(fleet, on_device):
    async def run(device):
        plan = fleet.plan(1, code=TASK)
        device.participant.handle(plan)
        await device.until(lambda: device.fits() == "1")
        fleet.stop()
        await device.until(device.store.failures)
        fleet.start()
        device.participant.reconcile([plan], None, 0)
        await device.until(lambda: ("j1", 1) in fleet.failures)
        assert device.fits() == "1"

    on_device(run, what="late")


def test_a_closed_round_that_a_restarted_cloud_waits_for_is_done_again(fleet, on_device):
    async def run(device):
        plan = fleet.plan(1, code=TASK)
        device.participant.handle(RoundClosed(job="j1", round=1, job_ended=False))  # the end was not durable
        asked_before = device.store.last_answered() - 1
        device.participant.handle(plan)
        device.participant.reconcile([plan], None, asked_before)  # settled since `Next` was asked: says nothing
        await asyncio.sleep(0.05)
        assert device.fits() == ""
        device.participant.reconcile([plan], None, device.store.last_answered())
        await device.until(lambda: ("j1", 1) in fleet.updates)

    on_device(run)


def test_an_agent_with_a_full_disk_says_so_and_takes_part_when_there_is_space(fleet, on_device):
    async def run(device):
        device.store._db.execute("PRAGMA query_only = ON")  # no statement can be written
        with pytest.raises(HomeError):
            device.store.mark_answered("j1", 9)
        device.participant.handle(fleet.plan(1, code=TASK))
        await device.until(lambda: ("j1", 1) in fleet.failures)
        assert "Free some space on its disk" in fleet.failures["j1", 1]
        device.store._db.execute("PRAGMA query_only = OFF")
        device.participant.handle(fleet.plan(2, code=TASK))
        await device.until(lambda: ("j1", 2) in fleet.updates)

    on_device(run)


def test_a_model_larger_than_the_disk_is_refused_before_a_byte_of_it_comes(fleet, home, on_device, monkeypatch):
    monkeypatch.setattr("edge_agent.disk.KEPT_BYTES", 1 << 60)

    async def run(device):
        device.participant.handle(fleet.plan(1, code=TASK))
        await device.until(lambda: ("j1", 1) in fleet.failures)
        assert "of disk space" in fleet.failures["j1", 1]
        assert not list((home / "work").iterdir())

    on_device(run)


def test_a_task_works_in_a_folder_of_its_own(fleet, home, on_device):
    async def run(device):
        device.participant.handle(fleet.plan(1, code=TASK.replace("import time", "import time; open('left.txt', 'w')")))
        await device.until(lambda: ("j1", 1) in fleet.updates)
        assert [one.name for one in (home / "tasks").glob("*/*")] == ["left.txt"]

    on_device(run)


FROZEN = """
    import numpy as np
    from edgefl import FitResult, Task

    def fit(parameters, config, options):
        with open(options["log"], "a") as log:
            log.write(f"{config.round} ")
        return FitResult(tree={"w": np.full_like(parameters["w"], parameters["f"][0])}, weight=1.0)

    task = Task(name="t", initial=dict, fit=fit, trained=["w"])
"""


def test_what_is_frozen_is_fetched_once_and_kept_while_the_job_lasts(fleet, home, on_device):
    file = io.BytesIO()
    write_tree({"f": np.full(2, 5.0, np.float32)}, file)
    frozen = fleet.blob(file.getvalue())

    async def run(device):
        for number in (1, 2):
            plan = dataclasses.replace(fleet.plan(number, code=FROZEN), frozen=frozen, parted=True)
            device.participant.handle(plan)
            await device.until(lambda number=number: ("j1", number) in fleet.updates and not device.store.outbox())
            assert {name: array.tolist() for name, array in fleet.tree("j1", number).items()} == {"w": [5.0] * 4}
        assert len([call for call in fleet.calls if call.startswith("download")]) == 4  # bundle, two models, frozen
        assert device.participant.jobs_with_data() == ["j1"]
        device.participant.forget(["j1"])  # as `Next` says where the job has ended unheard
        assert device.participant.jobs_with_data() == []

    on_device(run)
    assert not list((home / "frozen").iterdir())
