"""An extension of griffe, which reads the code for mkdocstrings: the fields of a dataclass as a table.

A field's meaning is in the comment behind it. The table ends the docstring of its class.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

from docs.generate.comments import comments_in
from docs.generate.markdown import prose, table

_FACTORY = re.compile(r"field\(default_factory=(lambda: (?P<value>.+)|(?P<name>\w+))\)")


class FieldComments(griffe.Extension):
    """Adds the tables."""

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Look at a class whose members are known."""
        if not any("dataclass" in str(one.value) for one in cls.decorators):
            return
        comments = comments_in("\n".join(cls.lines))
        rows = [
            (f"`{name}`", f"`{one.annotation}`{_default(one)}", prose(comments.get(name, "")))
            for name, one in cls.members.items()
            if isinstance(one, griffe.Attribute) and one.annotation is not None and not name.startswith("_")
        ]
        if rows:
            text = cls.docstring.value if cls.docstring is not None else ""
            fields = table(("field", "type", "what it is"), rows)
            cls.docstring = griffe.Docstring(f"{text}\n\n{fields}", parent=cls)


def _default(field: griffe.Attribute) -> str:
    if field.value is None:
        return ""
    made = _FACTORY.fullmatch(str(field.value))
    return f", default `{made['value'] or made['name'] + '()'}`" if made else f", default `{field.value}`"
