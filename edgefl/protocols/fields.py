"""Checks of a message's fields when the message is created, by the declared type of each field.

    bool, str, int, float   exactly this type (a bool is not an int; an integer is accepted as a float)
    int                     64 bits with a sign, as in SQLite and protobuf
    float                   finite
    str                     safe on one line (see `edgefl.terminal.text`), with limited length
    mappings, sequences     with a limited number of items; keys and items as above

A message derives from `Checked`; `limited` restricts a field further; `prose` marks a text for people, which
is cleaned and cut instead of refused.
Invariant: every message object can be encoded, stored, logged and shown.

The checks of a class are computed once and cached as functions: apart from sockets and disks, messages are
the largest cost of a small round.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from edgefl.errors import ConfigError, ProtocolError
from edgefl.terminal.text import is_safe, one_line

INT64 = 2**63
MAX_TEXT_CHARS = 64 << 10
MAX_KEY_CHARS = 200
MAX_ITEMS = 1000
MAX_PROSE_CHARS = 2000
MAX_SHOWN_CHARS = 200  # characters of a value that a refusal repeats

_T = TypeVar("_T")
_Fault = Callable[[Any], str]  # returns what is wrong with a value, or ""
_KEY = "limits"
_LINE_ENDS = str.maketrans("", "", "\n\r\t")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The limits of one field, or of an item of a mapping or sequence."""

    least: float | None = None
    most: float | None = None
    max_chars: int = MAX_TEXT_CHARS
    max_items: int = MAX_ITEMS
    prose: bool = False  # for people: cleaned, not refused
    raw: bool = False  # any text: a path on this machine, or a text that is checked later
    lines: bool = False  # text with several lines


def limited(
    *, least: float | None = None, most: float | None = None, max_chars: int = MAX_TEXT_CHARS,
    max_items: int = MAX_ITEMS,
) -> Mapping[str, Limits]:  # fmt: skip
    """Return a field's metadata: numbers from `least` to `most`, texts and collections with a maximum size."""
    return {_KEY: Limits(least=least, most=most, max_chars=max_chars, max_items=max_items)}


def prose(max_chars: int = MAX_PROSE_CHARS) -> Mapping[str, Limits]:
    """Return the metadata of a text for people."""
    return {_KEY: Limits(max_chars=max_chars, prose=True)}


def raw() -> Mapping[str, Limits]:
    """Return the metadata of a text that is not checked: a path on this machine, or checked later."""
    return {_KEY: Limits(raw=True)}


class Checked:
    """Base of every message: a frozen dataclass that checks its fields when it is created."""

    __slots__ = ()

    def __post_init__(self) -> None:
        check(self)


def check(message: Any) -> None:
    """Raise ProtocolError for the first field with a wrong value; clean fields of prose."""
    for name, limits, fault_of in _checks(message.__class__):
        value = getattr(message, name)
        if limits.prose and isinstance(value, str):
            object.__setattr__(message, name, one_line(value, limits.max_chars))
        elif fault := fault_of(value):
            raise ProtocolError(f"{type(message).__name__}: {name} {fault}")


def from_json(schema: type[_T], value: Any) -> _T:
    """Build a message from parsed JSON; raises ProtocolError. Unknown keys are ignored."""
    if not isinstance(value, Mapping):
        raise ProtocolError(f"{schema.__name__} is a JSON {type(value).__name__}, not an object")
    try:
        message: _T = _build(schema, value)
    except ProtocolError:
        raise
    except (ConfigError, TypeError, ValueError, OverflowError, RecursionError) as cause:
        raise ProtocolError(f"{schema.__name__}: {one_line(str(cause), MAX_SHOWN_CHARS)}") from cause
    return message


def to_json(value: Any) -> Any:
    """Return a message, or the value of a field, as plain JSON data."""
    if isinstance(value, (str, int, float)):
        return value
    if dataclasses.is_dataclass(value):
        return {name: to_json(getattr(value, name)) for name in _names(value.__class__)}
    if isinstance(value, Mapping):
        return {key: to_json(one) for key, one in value.items()}
    return [to_json(one) for one in value] if isinstance(value, list | tuple) else value


def json_fault(value: Any, limits: Limits) -> str:
    """Return what is wrong with JSON data without a schema; empty if nothing is."""
    try:
        return _checker(Any, limits)(value)
    except RecursionError:
        return "is nested too deeply"


def parse_json(data: bytes | str) -> Any:
    """Return the value of a JSON text; raises ProtocolError if it cannot be parsed."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as cause:  # also numbers with too many digits
        raise ProtocolError(f"message is not JSON: {one_line(str(cause), MAX_SHOWN_CHARS)}") from cause


def _build(schema: Any, value: Any) -> Any:
    """Build a dataclass from a JSON object; any other value is returned, for the check to refuse."""
    if not isinstance(value, Mapping):
        return value
    given = {}
    for name, is_required, built in _builders(schema):
        if name in value:
            given[name] = value[name] if built is None else built(value[name])
        elif is_required:
            raise ProtocolError(f"{schema.__name__}: {name} is missing")
    if issubclass(schema, Checked):
        return schema(**given)
    for name, limits, fault_of in _checks(schema):  # before `__post_init__`, which relies on the types
        if name in given and not limits.prose and (fault := fault_of(given[name])):
            raise ProtocolError(f"{schema.__name__}: {name} {fault}")
    record = schema(**given)
    check(record)
    return record


@functools.cache
def _names(schema: Any) -> list[str]:
    return [one.name for one in dataclasses.fields(schema)]


@functools.cache
def _builders(schema: Any) -> list[tuple[str, bool, Callable[[Any], Any] | None]]:
    """Return each field's name, whether it is required, and the function that builds its value from JSON."""
    hints, missing = get_type_hints(schema), dataclasses.MISSING
    return [
        (one.name, one.default is missing and one.default_factory is missing, _builder(hints[one.name]))
        for one in dataclasses.fields(schema)
    ]


def _builder(hint: Any) -> Callable[[Any], Any] | None:
    """Return the function that builds a value from JSON; None if the JSON value is used directly."""
    origin, of = get_origin(hint), [_builder(one) for one in get_args(hint)]
    if origin is None:
        return functools.partial(_build, hint) if dataclasses.is_dataclass(hint) else _float if hint is float else None
    build = next((one for one in of if one), None)
    if build is None or origin in (Union, types.UnionType):  # a union is a record or a number, or null
        return build
    return functools.partial(_build_values if issubclass(origin, Mapping) else _build_items, build)


def _build_values(build: Callable[[Any], Any], value: Any) -> Any:
    return {key: build(one) for key, one in value.items()} if isinstance(value, Mapping) else value


def _build_items(build: Callable[[Any], Any], value: Any) -> Any:
    return [build(one) for one in value] if isinstance(value, list) else value


def _float(number: Any) -> Any:
    return float(number) if type(number) is int else number


@functools.cache
def _checks(schema: Any) -> list[tuple[str, Limits, _Fault]]:
    """Return each field's name, its limits, and the function that finds its faults."""
    hints = get_type_hints(schema)
    limits = {one.name: one.metadata.get(_KEY, Limits()) for one in dataclasses.fields(schema)}
    return [(name, limit, _checker(hints[name], limit)) for name, limit in limits.items()]


def _checker(hint: Any, limits: Limits) -> _Fault:
    """Return the function that says what is wrong with a value."""
    origin, of = get_origin(hint), get_args(hint)
    if hint is Any:
        return lambda value: _checker_of(_kind_of(value), limits)(value)
    if origin in (Union, types.UnionType):
        return functools.partial(_union_fault, [_checker(one, limits) for one in of])
    if origin is not None:
        if not issubclass(origin, Mapping):
            return functools.partial(_sequence_fault, _checker(of[0], limits), limits)
        keys = Limits(max_chars=min(limits.max_chars, MAX_KEY_CHARS), raw=limits.raw)
        return functools.partial(_mapping_fault, functools.partial(_text_fault, keys), _checker(of[1], limits), limits)
    return functools.partial(_SCALARS[hint], limits) if hint in _SCALARS else functools.partial(_type_fault, hint)


_checker_of = functools.cache(_checker)  # for values without a declared type


def _kind_of(value: Any) -> Any:
    """Return the type by which a value without a declared type is checked."""
    if isinstance(value, Mapping):
        return Mapping[str, Any]
    if isinstance(value, list | tuple):
        return Sequence[Any]
    return type(value)


def _union_fault(of: list[_Fault], value: Any) -> str:
    first = of[0](value)
    return "" if not first or any(not fault(value) for fault in of[1:]) else first


def _type_fault(hint: Any, value: Any) -> str:
    if isinstance(hint, type) and not isinstance(value, hint):
        return f"is of type {type(value).__name__}, expected {hint.__name__}"
    if dataclasses.is_dataclass(value) and not isinstance(value, Checked):
        check(value)
    return ""


def _bool_fault(_limits: Limits, value: Any) -> str:
    return "" if type(value) is bool else f"is {_shown(value)}, expected true or false"


def _int_fault(limits: Limits, value: Any) -> str:
    if type(value) is not int:
        return f"is {_shown(value)}, expected a whole number"
    least = -INT64 if limits.least is None else limits.least
    most = INT64 - 1 if limits.most is None else limits.most
    return "" if least <= value <= most else f"is {_shown(value)}, expected {least} to {most}"


def _float_fault(limits: Limits, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"is {_shown(value)}, expected a number"
    least = -math.inf if limits.least is None else limits.least
    most = math.inf if limits.most is None else limits.most
    if not -math.inf < value < math.inf or not least <= value <= most:  # NaN fails here too
        bounds = "" if limits.least is limits.most is None else f" from {least:g} to {most:g}"
        return f"is {_shown(value)}, not a finite number{bounds}"
    return ""


def _text_fault(limits: Limits, value: Any) -> str:
    if not isinstance(value, str):
        return f"is {_shown(value)}, expected text"
    if len(value) > limits.max_chars:
        return f"has {len(value)} characters, expected {limits.max_chars} at most"
    if limits.raw or is_safe(value.translate(_LINE_ENDS) if limits.lines else value):
        return ""
    return f"is {value!r:.{MAX_SHOWN_CHARS}}, expected text without control characters"


def _mapping_fault(of_key: _Fault, of_value: _Fault, limits: Limits, value: Any) -> str:
    if not isinstance(value, Mapping):
        return f"is {_shown(value)}, expected an object"
    if len(value) > limits.max_items:
        return f"has {len(value)} entries, expected {limits.max_items} at most"
    for key, one in value.items():
        if fault := of_key(key) or of_value(one):
            return f"holds {_shown(key)} that {fault}"
    return ""


def _sequence_fault(of_item: _Fault, limits: Limits, value: Any) -> str:
    if not isinstance(value, list | tuple):
        return f"is {_shown(value)}, expected a list"
    if len(value) > limits.max_items:
        return f"has {len(value)} entries, expected {limits.max_items} at most"
    return next((f"holds an entry that {fault}" for one in value if (fault := of_item(one))), "")


def _shown(value: Any) -> str:
    if type(value) is int and abs(value) >= 2**128:  # Python refuses to print very long integers
        return f"a number of {value.bit_length()} bits"
    return one_line(repr(value) if not isinstance(value, Mapping | list) else f"a {type(value).__name__}", 80)


_SCALARS: Mapping[Any, Callable[[Limits, Any], str]] = {
    bool: _bool_fault,
    int: _int_fault,
    float: _float_fault,
    str: _text_fault,
}
