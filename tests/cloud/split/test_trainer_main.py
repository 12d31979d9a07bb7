"""The training process's answers to faults: the status by whose fault it is, and its session alone ends."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from cloud.split.cache import QuotaExceeded
from cloud.split.records import END, FRAME, HEAD, OPEN, TAKEN, record
from cloud.split.trainer_main import CloudTrainer, refusal_of
from edgefl.errors import ProtocolError, TaskError
from edgefl.protocols.split.messages import pack, parse_frame
from tests.cloud.split.bench import Bench, settings
from tests.edgefl.offload.training.models import picture_task


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (QuotaExceeded("full"), "RESOURCE_EXHAUSTED"),
        (MemoryError(), "RESOURCE_EXHAUSTED"),
        (RuntimeError("[enforce fail] you tried to allocate 99 bytes"), "RESOURCE_EXHAUSTED"),
        (ProtocolError("x"), "INVALID_ARGUMENT"),
        (RuntimeError("shapes"), "INVALID_ARGUMENT"),
        (TaskError("x"), "FAILED_PRECONDITION"),
        (OSError("disk"), "UNAVAILABLE"),
    ],
)
def test_whose_fault_it_is(error: BaseException, status: str) -> None:
    seen, reason = refusal_of(error)
    assert seen == status
    assert reason


def test_a_fault_ends_its_session_alone(tmp_path: Path) -> None:
    bench = Bench(picture_task(), settings(), tmp_path)
    ours, theirs = socket.socketpair()
    loops = [bench.device(f"device-{n}") for n in (1, 2)]
    for number, loop in enumerate(loops, 1):
        ours.sendall(record(number, OPEN, bench.spec(loop, f"device-{number}").encode()))
    ours.sendall(record(1, FRAME, b"nothing"))
    ours.sendall(record(2, FRAME, pack(loops[1].run.begin)[4:]))
    ours.sendall(record(1, FRAME, pack(loops[0].run.begin)[4:]))  # after its end: nothing
    ours.shutdown(socket.SHUT_WR)
    with theirs:
        CloudTrainer(theirs, bench.cloud).run()
    said, data = [], b""
    while part := ours.recv(1 << 16):
        data += part
    while data:
        number, kind, length = HEAD.unpack(data[: HEAD.size])
        said.append((number, kind, data[HEAD.size : HEAD.size + length]))
        data = data[HEAD.size + length :]
    ours.close()
    assert [(number, kind) for number, kind, _ in said[1:]] == [(1, END), (2, FRAME), (2, TAKEN)]
    assert json.loads(said[1][2])["status"] == "INVALID_ARGUMENT"
    assert parse_frame(said[2][2][4:]).message.kind == "begun"
