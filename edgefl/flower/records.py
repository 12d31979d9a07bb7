"""Flower's records: copies that share no mutable part, their size, and conversion from and to trees.

Flower's engines serialise each message, so a client cannot change what another client sees.
Here nothing is serialised: a copy has its own dictionaries and lists, and shares the arrays' bytes,
which are immutable.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from edgefl.flower.internals import twin_of, with_own_metadata
from edgefl.trees import Array as NumpyArray
from edgefl.trees import Tree

NUMBER_BYTES = 8  # a number on the wire


def copy_records(records: RecordDict) -> RecordDict:
    """Return a copy that shares only immutable bytes."""
    return RecordDict({name: _copy_record(record) for name, record in records.items()})


def copy_message(message: Message) -> Message:
    """Return the message as its receiver gets it: with its own metadata and records."""
    twin = with_own_metadata(message)
    if message.has_content():
        twin.content = copy_records(message.content)
    return twin


def message_bytes(message: Message) -> int:
    """Bytes of a message's records; an error has none."""
    return records_bytes(message.content) if message.has_content() else 0


def records_bytes(records: RecordDict) -> int:
    """Size of records in bytes: arrays as stored, 8 per number, the length of a text or bytes, and all keys.

    Flower's own count_bytes raises for an empty list, an empty text and empty bytes, which its examples send.
    """
    return sum(_record_bytes(record) for record in records.values())


def record_of(tree: Tree) -> ArrayRecord:
    """Return a tree as an ArrayRecord."""
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in tree.items()})


def tree_of(record: ArrayRecord) -> dict[str, NumpyArray]:
    """Return an ArrayRecord's arrays."""
    return {name: array.numpy() for name, array in record.items()}


def _record_bytes(record: ArrayRecord | MetricRecord | ConfigRecord) -> int:
    if isinstance(record, ArrayRecord):
        return sum(len(name) + len(array.data) for name, array in record.items())
    values: dict[str, Any] = dict(record)
    return sum(len(name) + _value_bytes(value) for name, value in values.items())


def _value_bytes(value: Any) -> int:
    if isinstance(value, list):
        return sum(map(_value_bytes, value))
    if isinstance(value, bool):
        return 1
    return len(value) if isinstance(value, (str, bytes)) else NUMBER_BYTES


def _copy_record(record: ArrayRecord | MetricRecord | ConfigRecord) -> ArrayRecord | MetricRecord | ConfigRecord:
    if isinstance(record, ArrayRecord):
        return ArrayRecord({name: twin_of(array) for name, array in record.items()})
    values: dict[str, Any] = {name: list(v) if isinstance(v, list) else v for name, v in record.items()}
    return MetricRecord(values) if isinstance(record, MetricRecord) else ConfigRecord(values)
