"""Select expressions: `mem_mb >= 512 and tag.site == 'plant-3'`, which a device meets or not.

    or       :=  and ("or" and)*
    and      :=  not ("and" not)*
    not      :=  "not" not  |  compare
    compare  :=  value (("==" | "!=" | "<" | "<=" | ">" | ">=") value)*
              |  value ["not"] "in" ("(" value "," ... ")" | text)
    value    :=  number | 'text' | true | false | field | tag.NAME | tag['NAME'] | "(" or ")"

It is read with Python's own parser into a syntax tree, of which only the nodes above are accepted; nothing is ever
evaluated as Python. Types are checked before any device is asked. A comparison with a value that is not known is not
known, and `and`, `or`, `not` follow Kleene's logic. Invariant: reading takes bounded time, memory and depth.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgefl.choosing.facts import REPORTED, TAG, Facts, Value, known_text, shown, type_of
from edgefl.errors import ConfigError

MAX_CHARS, MAX_TERMS, MAX_DEPTH = 4000, 100, 20
MAX_SHOWN = 5  # fields in a reason

_COMPARE: Mapping[type[ast.cmpop], tuple[str, Callable[[Any, Any], object]]] = {
    ast.Eq: ("==", operator.eq),
    ast.NotEq: ("!=", operator.ne),
    ast.Lt: ("<", operator.lt),
    ast.LtE: ("<=", operator.le),
    ast.Gt: (">", operator.gt),
    ast.GtE: (">=", operator.ge),
}
_EQUALITY = (ast.Eq, ast.NotEq)
_CALLED: Mapping[type[Value], str] = {float: "a number", str: "a text", bool: "true or false"}
_REMEDY = (
    "Allowed are numbers, texts in quotes, true, false, fields, == != < <= > >=, in, and, or, not, and parentheses"
)

_Read = Callable[[Facts], Value | None]


@dataclass(frozen=True, slots=True)
class _Typed:
    """A part of an expression: the type of its values, and how it is computed for a device."""

    type: type[Value]
    read: _Read


@dataclass(frozen=True, slots=True)
class Expression:
    """A condition on devices."""

    text: str
    fields: tuple[str, ...]  # that it reads, each once
    _read: _Read

    def why_not(self, facts: Facts) -> str:
        """Return why a device does not meet the condition; empty if it does.

        Where the result is not known, a device is excluded only if it has not reported one of the fields.
        """
        met = self._read(facts)
        if met is True:
            return ""
        if met is None:
            missing = [name for name in self.fields if name in REPORTED and facts(name) is None]
            return f"it has not reported {', '.join(missing[:MAX_SHOWN])}" if missing else ""
        values = [f"{name} is {shown(facts(name))}" for name in self.fields[:MAX_SHOWN]]
        return ", ".join(values) or "the expression is false for every device"


def parse(text: str, key: str = "rounds.select") -> Expression:
    """Read an expression; raises ConfigError, which names `key`, for anything else."""
    return _ExpressionReader(key, text).expression()


class _ExpressionReader:
    """Reads one expression."""

    def __init__(self, key: str, text: str) -> None:
        self._key, self._text = key, text
        self._fields: dict[str, None] = {}
        self._num_terms = 0

    def expression(self) -> Expression:
        text = self._text
        if len(text) > MAX_CHARS:
            raise self._fault(f"it has {len(text)} characters; at most {MAX_CHARS} are allowed")
        if "\\" in text or not text.isprintable():
            raise self._fault("a backslash or a control character is not allowed")
        try:
            tree = ast.parse(text.strip(), mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as cause:
            where = f" at character {cause.offset}" if isinstance(cause, SyntaxError) and cause.offset else ""
            raise self._fault(f"it cannot be read{where}: {getattr(cause, 'msg', cause)}. {_REMEDY}") from cause
        read = self._condition(tree.body, 1)
        return Expression(text, tuple(self._fields), read)

    def _condition(self, node: ast.expr, depth: int) -> _Read:
        part = self._part(node, depth)
        if part.type is not bool:
            raise self._fault(f"{self._quoted(node)} is {_CALLED[part.type]}; expected a condition, which is true or "
                              "false")  # fmt: skip
        return part.read

    def _part(self, node: ast.expr, depth: int) -> _Typed:
        self._num_terms += 1
        if self._num_terms > MAX_TERMS:
            raise self._fault(f"it has more than {MAX_TERMS} terms; write fewer, or give the devices a tag")
        if depth > MAX_DEPTH:
            raise self._fault(f"it is nested more than {MAX_DEPTH} deep")
        match node:
            case ast.BoolOp(op=op, values=values):
                return _Typed(
                    bool, _joined([self._condition(one, depth + 1) for one in values], isinstance(op, ast.Or))
                )
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return _Typed(bool, _negated(self._condition(operand, depth + 1)))
            case ast.Compare():
                return self._comparison(node, depth)
        return self._value(node)

    def _comparison(self, node: ast.Compare, depth: int) -> _Typed:
        read: list[_Read] = []
        left_node, left = node.left, self._part(node.left, depth + 1)
        for op, right_node in zip(node.ops, node.comparators, strict=True):
            if isinstance(op, ast.In | ast.NotIn):
                if len(node.ops) > 1:
                    raise self._fault(f"{self._quoted(node)} compares twice; write `and` between two comparisons")
                member = self._membership(left_node, left, right_node, depth)
                return _Typed(bool, member if isinstance(op, ast.In) else _negated(member))
            if type(op) not in _COMPARE:
                raise self._fault(f"`is` is not allowed in {self._quoted(node)}; write ==")
            sign, compare = _COMPARE[type(op)]
            right = self._part(right_node, depth + 1)
            if left.type is not right.type:
                raise self._fault(
                    f"{self._quoted(left_node)} is {_CALLED[left.type]} and {self._quoted(right_node)} is "
                    f"{_CALLED[right.type]}; {sign} compares two of a kind"
                )
            if left.type is bool and not isinstance(op, _EQUALITY):
                raise self._fault(f"{sign} does not compare true and false in {self._quoted(node)}; use == or not")
            read.append(_compared(left.read, right.read, compare))
            left_node, left = right_node, right
        return _Typed(bool, _joined(read, is_or=False))

    def _membership(self, left_node: ast.expr, left: _Typed, right_node: ast.expr, depth: int) -> _Read:
        if isinstance(right_node, ast.Tuple | ast.List | ast.Set):
            parts = [self._part(one, depth + 1) for one in right_node.elts]
            for one, part in zip(right_node.elts, parts, strict=True):
                if part.type is not left.type:
                    raise self._fault(
                        f"{self._quoted(left_node)} is {_CALLED[left.type]} and {self._quoted(one)} is "
                        f"{_CALLED[part.type]}; `in` compares two of a kind"
                    )
            return _joined([_compared(left.read, part.read, operator.eq) for part in parts], is_or=True)
        right = self._part(right_node, depth + 1)
        if left.type is not str or right.type is not str:
            raise self._fault(f"{self._quoted(right_node)} is {_CALLED[right.type]}; `in` needs a list such as (1, 2), "
                              "or a text in a text")  # fmt: skip
        return _compared(right.read, left.read, operator.contains)

    def _value(self, node: ast.expr) -> _Typed:
        match node:
            case ast.Constant(value=bool() | str() as value):
                part = _constant(type(value), value)
            case ast.Constant(value=int() | float() as value):
                part = self._number(node, value)
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
                part = self._number(node, -value)
            case ast.Name(id="true" | "false" as word):
                part = _constant(bool, word == "true")
            case ast.Name(id=name):
                part = self._field(name)
            case ast.Attribute(value=ast.Name(id="tag"), attr=name):
                part = self._field(TAG + name)
            case ast.Subscript(value=ast.Name(id="tag"), slice=ast.Constant(value=str() as name)):
                part = self._field(TAG + name)
            case ast.Call():
                raise self._fault(f"{self._quoted(node)} is a call; nothing is called. {_REMEDY}")
            case _:
                raise self._fault(f"{self._quoted(node)} is not allowed. {_REMEDY}")
        return part

    def _number(self, node: ast.expr, value: float) -> _Typed:
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self._fault(f"the number {self._quoted(node)} is too large")
        return _constant(float, number)

    def _field(self, name: str) -> _Typed:
        kind = type_of(name)
        if kind is None:
            raise self._fault(f"there is no field {name[:80]!r}. Known are: {known_text()}")
        self._fields[name] = None
        return _Typed(kind, lambda facts: facts(name))

    def _quoted(self, node: ast.expr) -> str:
        text = ast.get_source_segment(self._text.strip(), node) or type(node).__name__
        return f"`{text[:80]}{'...' if len(text) > 80 else ''}`"

    def _fault(self, what: str) -> ConfigError:
        shown_text = f"{self._text[:60]}..." if len(self._text) > 60 else self._text
        return ConfigError(f"{self._key}={shown_text!r}: {what}")


def _constant(kind: type[Value], value: Value) -> _Typed:
    return _Typed(kind, lambda _facts: value)


def _compared(left: _Read, right: _Read, compare: Callable[[Any, Any], object]) -> _Read:
    def read(facts: Facts) -> bool | None:
        one, other = left(facts), right(facts)
        return None if one is None or other is None else bool(compare(one, other))

    return read


def _joined(parts: Sequence[_Read], is_or: bool) -> _Read:  # noqa: FBT001 - and | or
    def read(facts: Facts) -> bool | None:
        values = [part(facts) for part in parts]
        if is_or in values:
            return is_or
        return None if None in values else not is_or

    return read


def _negated(part: _Read) -> _Read:
    def read(facts: Facts) -> bool | None:
        value = part(facts)
        return None if value is None else not value

    return read
