"""Messages: every one comes back from its bytes; what is not one is refused, and nothing else happens."""

from __future__ import annotations

import json
from typing import Any

import pytest

from edgefl.config import TrainConfig
from edgefl.errors import ProtocolError
from edgefl.protocols import messages
from edgefl.protocols.messages import (
    BlobRef,
    Deliver,
    DeviceState,
    Fit,
    LogWanted,
    RolloutNote,
    RoundClosed,
    Signed,
    Telemetry,
    UpdateRefused,
    decode,
    decode_command,
    decode_job,
    encode,
)

FIT = Fit(
    job="job", round=3, model=BlobRef(sha256="ab", size=4), model_blake3="00",
    bundle=Signed(text="{}", key_id="k", signature="c2ln"), train=TrainConfig(lr=0.5), deadline_s=600.0,
    max_update_bytes=1 << 20,
)  # fmt: skip
DELIVER = Deliver(
    job="relay", round=7, envelope="e", content=BlobRef(sha256="cd", size=4), content_blake3="00", bundle=FIT.bundle,
    deadline_s=60.0, max_update_bytes=1 << 20,
)  # fmt: skip
JOB_MESSAGES = [
    FIT,
    DELIVER,
    RoundClosed(job="job", round=3, job_ended=True),
    UpdateRefused(job="job", round=3, reason="tensor 'w' holds NaN"),
]
OTHERS = [
    DeviceState(session=1, online=True, agent_version="0.1.0", models={"digits": 3}, tags={"a": "b"}, commands=["log"]),
    LogWanted(request="r", lines=5, job="job-1"),
    RolloutNote(model="digits", version=3, state="active"),
    Telemetry(
        cpu_count=4, cpu_percent=12.5, load_1m=0.5, ram_total_mb=1e3, ram_available_mb=5e2, disk_free_mb=1e4,
        battery_percent=80.0, on_mains=False,
    ),
]  # fmt: skip


@pytest.mark.parametrize("message", [*JOB_MESSAGES, *OTHERS], ids=lambda m: type(m).__name__)
def test_every_message_comes_back(message: Any) -> None:
    assert decode(type(message), encode(message)) == message


@pytest.mark.parametrize("message", JOB_MESSAGES, ids=lambda m: type(m).__name__)
def test_a_job_message_says_its_kind(message: Any) -> None:
    assert decode_job(encode(message)) == message


def test_bytes_by_hand() -> None:
    data = b'{"job":"job","round":3,"job_ended":true,"kind":"closed"}'
    assert encode(RoundClosed(job="job", round=3, job_ended=True)) == data


def test_a_newer_cloud_may_say_more() -> None:
    value = {**json.loads(encode(FIT)), "colour": "red"}
    value["model"]["codec"] = "none"
    assert decode_job(json.dumps(value).encode()) == FIT


def test_a_whole_number_is_a_number() -> None:
    value = {**json.loads(encode(FIT)), "deadline_s": 600}
    assert decode_job(json.dumps(value).encode()) == FIT


def without(key: str) -> bytes:
    value = json.loads(encode(FIT))
    del value[key]
    return json.dumps(value).encode()


def changed(**changes: Any) -> bytes:
    return json.dumps({**json.loads(encode(FIT)), **changes}).encode()


BAD = {
    "empty": b"",
    "cut short": encode(FIT)[:-1],
    "not UTF-8": b'{"kind":"\xff"}',
    "a list": b"[]",
    "a number": b"3",
    "nested too deeply": b"[" * 30_000,
    "too large": b'{"kind":"fit","x":"' + b"x" * messages.MAX_MESSAGE_BYTES + b'"}',
    "no kind": without("kind"),
    "unknown kind": changed(kind="party"),
    "of an older cloud": changed(kind="plan"),
    "of another kind": changed(kind="deliver"),
    "kind is a list": changed(kind=["fit"]),
    "no job": without("job"),
    "round is text": changed(round="3"),
    "round is a fraction": changed(round=3.5),
    "model is text": changed(model="ab"),
    "model without size": changed(model={"sha256": "ab"}),
    "learning rate that cannot be": changed(train={"lr": -1}),
    "algorithm that is not": changed(train={"algorithm": "magic"}),
}


@pytest.mark.parametrize("fault", BAD)
def test_what_is_not_a_message_is_refused(fault: str) -> None:
    with pytest.raises(ProtocolError):
        decode_job(BAD[fault])


def test_what_would_be_too_large_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match=r"Signed has \d+ bytes; at most 32768 are allowed"):
        encode(Signed(text="x" * messages.MAX_MESSAGE_BYTES, key_id="k", signature="s"))


def test_a_reason_is_cleaned_and_cut_not_refused() -> None:
    refused = UpdateRefused(job="job", round=1, reason="\x1b[31mred\nforged=line " + "x" * 40_000)
    assert refused.reason.startswith("\\x1b[31mred forged=line xxx")
    assert len(refused.reason) < 2020
    assert decode_job(encode(refused)) == refused


def test_a_command_says_its_kind_and_others_are_refused() -> None:
    wanted = LogWanted(request="r", lines=5)
    assert decode_command(encode(wanted)) == wanted
    for data, said in {
        b'{"kind":"reboot"}': "update the agent",
        b'{"kind":"log","request":"r"}': "lines is missing",
    }.items():
        with pytest.raises(ProtocolError, match=said):
            decode_command(data)
    for lines in (0, 10_001):
        with pytest.raises(ProtocolError, match="lines"):
            LogWanted(request="r", lines=lines)


def test_an_agent_that_names_no_commands_follows_none() -> None:
    old = b'{"session":1,"online":true,"agent_version":"0.1.0"}'
    assert decode(DeviceState, old).commands == []
