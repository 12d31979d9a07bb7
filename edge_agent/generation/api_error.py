"""Errors in the form of OpenAI's API: https://platform.openai.com/docs/guides/error-codes."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """A request that gets an error, in OpenAI's form."""

    def __init__(self, status: int, message: str, *, kind: str = "", param: str = "", code: str = "") -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")

    def as_json(self) -> dict[str, Any]:
        """Return the body of the response."""
        error = {"message": str(self), "type": self.kind, "param": self.param or None, "code": self.code or None}
        return {"error": error}
