"""Checks the header of an upload, before any byte of the update is accepted."""

from __future__ import annotations

import math

from cloud.jobs.answers import AnswerRow
from edgefl.guards import MAX_EVALUATED, MAX_NAME_CHARS
from edgefl.protocols import fleet_pb2 as pb
from edgefl.records import DeviceEvaluation
from edgefl.terminal.text import is_safe, one_line

MAX_FAULT_CHARS = 2000
MAX_METRICS, MAX_METRIC_CHARS = 100, 200  # per update, because they are kept with the round


def header_fault(header: pb.UploadHeader, most: int) -> str | None:
    """Return why the update is refused; None if it is not. An update may have `most` bytes."""
    if header.size > most:
        return f"the update has {header.size} bytes; at most {most} are allowed in this round"
    longest = max(map(len, header.metrics), default=0)
    if len(header.metrics) > MAX_METRICS or longest > MAX_METRIC_CHARS:
        return (
            f"the update has {len(header.metrics)} metrics, with names of up to {longest} characters; at most "
            f"{MAX_METRICS} metrics with names of {MAX_METRIC_CHARS} characters are allowed"
        )
    if not math.isfinite(header.weight):
        return f"the update's weight is {header.weight}, expected a finite number"
    for name, value in header.metrics.items():
        if not math.isfinite(value) or not is_safe(name):
            return (
                f"the update's metric {name!r} is {value}; expected a finite number, and a name without control "
                "characters"
            )
    return None


def answer_of(header: pb.UploadHeader, device: str, file: str, *, late: bool = False) -> AnswerRow:
    """Return a device's answer with these facts, whose update is in a file of the spool."""
    return AnswerRow(
        device=device,
        file=file,
        weight=header.weight,
        metrics=dict(header.metrics),
        evaluation=evaluation_in(header),
        late=late,
    )


def evaluation_in(header: pb.UploadHeader) -> DeviceEvaluation | None:
    """Return the header's evaluation, if it has one; one that cannot be stored becomes the reason why not.

    The update counts all the same. Whether the metrics are those of the task is checked in its round.
    """
    if not header.HasField("evaluation"):
        return None
    sent = header.evaluation
    if sent.fault:
        return DeviceEvaluation(fault=one_line(sent.fault, MAX_FAULT_CHARS))
    longest = max(map(len, sent.metrics), default=0)
    if len(sent.metrics) > MAX_EVALUATED or longest > MAX_NAME_CHARS:
        return DeviceEvaluation(
            fault=f"evaluation: it has {len(sent.metrics)} metrics, with names of up to {longest} characters; at most "
            f"{MAX_EVALUATED} metrics with names of {MAX_NAME_CHARS} characters are allowed"
        )
    if not all(map(math.isfinite, (sent.weight, *sent.metrics.values()))) or not all(map(is_safe, sent.metrics)):
        return DeviceEvaluation(
            fault="evaluation: a number is not finite, or the name of a metric has control characters"
        )
    return DeviceEvaluation(metrics=dict(sent.metrics), weight=sent.weight)


def overlong(size: int) -> str:
    """Return what is said of an upload that goes on after the size in its header."""
    return f"the upload has more than the {size} bytes in its header"
