"""The trainer's connection over a real socket: frames in records, and how a stream ends."""

from __future__ import annotations

import contextlib
import socket
import threading
from pathlib import Path

import pytest

from edge_agent.training.split.link import DATA, END, HEAD, LinkLost, SocketLink, end_record, ended
from edgefl.errors import ProtocolError, TaskError
from edgefl.protocols.split.messages import FinishTraining, Kept, StreamRefused, TrainingFinished, pack


def serving(path: Path, *records: bytes, is_read: bool = True) -> threading.Thread:
    """Accept one connection, read a frame, write these records, and close."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        with listener:
            connection, _ = listener.accept()
            with connection:
                if is_read:
                    connection.recv(len(data(pack(FinishTraining()))), socket.MSG_WAITALL)
                for one in records:
                    connection.sendall(one)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


def data(content: bytes) -> bytes:
    return HEAD.pack(DATA, len(content)) + content


def test_frames_come_in_records_of_any_size(tmp_path: Path) -> None:
    frames = pack(Kept(step=3), b"abc") + pack(TrainingFinished())
    thread = serving(
        tmp_path / "s", data(frames[:5]), data(frames[5:40]), data(frames[40:]), end_record("UNAVAILABLE", "gone")
    )
    link = SocketLink(tmp_path / "s", 5.0)
    link.send(FinishTraining())
    first = link.receive()
    assert first.message == Kept(step=3)
    assert bytes(first.sections[0]) == b"abc"
    assert link.receive().message == TrainingFinished()
    assert link.received_bytes == len(frames)
    with pytest.raises(LinkLost, match=r"cannot be reached \(UNAVAILABLE\): gone"):
        link.receive()
    link.close()
    thread.join()


@pytest.mark.parametrize("is_read", [True, False])
@pytest.mark.parametrize(
    ("record", "error", "words"),
    [
        (end_record("PERMISSION_DENIED", "not asked"), TaskError, "refuses this device .PERMISSION_DENIED.: not asked"),
        (data(pack(StreamRefused(status="INVALID_ARGUMENT", reason="NaN"))), TaskError, "INVALID_ARGUMENT.: NaN"),
        (b"", LinkLost, "the agent closed the connection"),
        (HEAD.pack(END, 3) + b"???", ProtocolError, "an invalid end of a stream"),
        (data(b"\x02\x00\x00\x00"), ProtocolError, "a message of 2 bytes"),
    ],
    ids=["refused", "refused-in-words", "nothing", "no-json", "no-frame"],
)
def test_how_a_stream_ends(tmp_path: Path, record: bytes, error: type[Exception], words: str, is_read: bool) -> None:
    thread = serving(tmp_path / "s", record, is_read=is_read)
    with contextlib.closing(SocketLink(tmp_path / "s", 5.0)) as link:
        if not is_read:
            thread.join()  # it has ended before anything is sent
        with pytest.raises(error, match=words):
            answer_of(link)
    thread.join()


def answer_of(link: SocketLink) -> object:
    link.send(FinishTraining())
    return link.receive()


def test_no_answer_in_time_is_a_lost_link(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    with listener:
        link = SocketLink(tmp_path / "s", 0.05)
        with pytest.raises(LinkLost, match=r"no answer within 0.05 s"):
            link.receive()
        link.close()
    with pytest.raises(LinkLost, match="cannot be connected"):
        SocketLink(tmp_path / "none", 1.0)


def test_which_status_may_be_tried_again() -> None:
    assert isinstance(ended("UNAVAILABLE", ""), LinkLost)
    assert isinstance(ended("CANCELLED", ""), LinkLost)
    assert isinstance(ended("FAILED_PRECONDITION", ""), TaskError)
    assert isinstance(ended("RESOURCE_EXHAUSTED", ""), TaskError)
