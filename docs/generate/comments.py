"""The comments behind the fields of a dataclass, which say what a field is and in which unit."""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize


def field_comments(kind: type) -> dict[str, str]:
    """Return field -> the comment on its last line, for the fields that have one."""
    return comments_in(textwrap.dedent(inspect.getsource(kind)))


def comments_in(source: str) -> dict[str, str]:
    """Return the comments of the annotated names in the source of one class."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    by_line = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    (node,) = ast.parse(source).body
    if not isinstance(node, ast.ClassDef):
        raise TypeError(f"expected the source of a class, got a {type(node).__name__}")
    return {
        one.target.id: by_line[line]
        for one in node.body
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
        if (line := one.end_lineno or one.lineno) in by_line
    }
