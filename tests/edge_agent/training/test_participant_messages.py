"""Messages of a relayed Flower app on the device: each is answered, in turn, by a real trainer."""

from __future__ import annotations

import dataclasses
import io
import textwrap
import zipfile

from blake3 import blake3
from flwr.app import ConfigRecord, Message, RecordDict

from edgefl.flower.fleet import wire
from edgefl.flower.internals import give_id, task_identity
from edgefl.protocols.manifest import Bundle, sign
from edgefl.protocols.messages import Deliver, RoundClosed

CLIENT = """
    import os, time
    from pathlib import Path
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.query()
    def count(message, context):
        with open(context.node_config["log"], "a") as log:
            log.write("asked ")
        if message.content["ask"]["hang"]:
            time.sleep(60)
        seen = context.state.config_records.get("seen", ConfigRecord({"n": 0}))["n"] + 1
        context.state["seen"] = ConfigRecord({"n": seen})
        return Message(RecordDict({"seen": ConfigRecord({"n": seen})}), reply_to=message)

    @app.train()
    def die(message, context):
        os._exit(3)
"""


def message_plan(fleet, number, kind="query", *, hang=False):
    """Return the plan of a message to a small ClientApp, and the message."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("client_app.py", textwrap.dedent(CLIENT))
        archive.writestr("pyproject.toml", '[tool.flwr.app.components]\nclientapp = "client_app:app"\n')
    with task_identity(1):
        message = Message(RecordDict({"ask": ConfigRecord({"hang": hang})}), wire.node_id("cam-1"), kind)
    give_id(message, f"1-{number}")
    order = wire.pack_order({}, message.content)
    bundle = sign(Bundle(blob=fleet.blob(file.getvalue()), task="client_app:app"), fleet.key)
    asked = Deliver(
        job="relay", round=number, envelope=wire.pack_envelope(message), content=fleet.blob(order),
        content_blake3=blake3(order).hexdigest(), bundle=bundle, deadline_s=60.0, max_update_bytes=1 << 20,
    )  # fmt: skip
    return asked, message


def counted(fleet, number, message):
    return wire.open_reply(fleet.updates["relay", number][1], message).content["seen"]["n"]


def test_each_message_is_answered_in_turn_and_the_state_goes_with_the_job(fleet, home, on_device):
    async def run(device):
        sent = [message_plan(fleet, number) for number in (1, 2, 3)]
        for plan, _ in sent:
            device.participant.handle(plan)
        device.participant.handle(sent[0][0])
        await device.until(lambda: len(fleet.updates) == 3 and not device.store.outbox())
        assert [counted(fleet, number, message) for number, (_, message) in enumerate(sent, 1)] == [1, 2, 3]
        assert device.fits() == "asked asked asked"
        assert device.store.jobs_with_state() == ["relay"]
        device.participant.handle(RoundClosed(job="relay", round=3, job_ended=True))
        assert device.store.jobs_with_state() == []
        assert list((home / "states").iterdir()) == []

    on_device(run)


def test_a_message_that_is_no_longer_wanted_is_left_and_the_next_is_answered(fleet, on_device):
    async def run(device):
        (first, _), (second, message), (third, _) = (message_plan(fleet, n, hang=n == 1) for n in (1, 2, 3))
        for plan in (first, second, third):
            device.participant.handle(plan)
        await device.until(lambda: device.fits() == "asked")
        device.participant.close(RoundClosed(job="relay", round=3, job_ended=False))
        device.participant.close(RoundClosed(job="relay", round=1, job_ended=False))
        await device.until(lambda: ("relay", 2) in fleet.updates)
        assert counted(fleet, 2, message) == 1
        assert device.store.is_answered("relay", 3)
        assert fleet.failures == {}

    on_device(run)


def test_a_client_that_ends_its_process_is_a_failure(fleet, on_device):
    async def run(device):
        plan, _ = message_plan(fleet, 1, "train")
        device.participant.handle(plan)
        await device.until(lambda: fleet.failures)
        assert fleet.failures["relay", 1] == "the trainer ended with exit status 3 while it trained"
        assert device.store.jobs_with_state() == []

    on_device(run)


def test_a_reply_that_is_too_large_is_a_failure_and_the_state_stays(fleet, home, on_device):
    async def run(device):
        plan, _ = message_plan(fleet, 1)
        device.participant.handle(dataclasses.replace(plan, max_update_bytes=10))
        await device.until(lambda: fleet.failures)
        assert "accepts at most 10" in fleet.failures["relay", 1]
        assert list((home / "states").iterdir()) == []

    on_device(run)
