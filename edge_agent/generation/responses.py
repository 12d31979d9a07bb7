"""Responses of the OpenAI API: objects, and chunks of a stream of server-sent events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Tokens of one response."""

    prompt: int
    completion: int

    def as_json(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class TextReply:
    """What all objects of one response have in common."""

    id: str
    model: str
    created_s: int
    fingerprint: str
    is_chat: bool

    def whole(self, text: str, finish: str, usage: Usage) -> dict[str, Any]:
        """Return the response with all of the text."""
        part: dict[str, Any] = {"text": text}
        if self.is_chat:
            part = {"message": {"role": "assistant", "content": text, "refusal": None}}
        choice = {"index": 0, **part, "logprobs": None, "finish_reason": finish}
        kind = "chat.completion" if self.is_chat else "text_completion"
        return self._object(kind, choices=[choice], usage=usage.as_json())

    def chunk(self, text: str, finish: str | None = None, *, begins: bool = False) -> bytes:
        """Return an event with a piece of the text."""
        part: dict[str, Any] = {"text": text}
        if self.is_chat:
            delta = {**({"role": "assistant"} if begins else {}), **({} if finish else {"content": text})}
            part = {"delta": delta}
        choice = {"index": 0, **part, "logprobs": None, "finish_reason": finish}
        return event_of(self._object(self._chunk_kind, choices=[choice]))

    def usage_chunk(self, usage: Usage) -> bytes:
        """Return the last event, with the usage."""
        return event_of(self._object(self._chunk_kind, choices=[], usage=usage.as_json()))

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.is_chat else "text_completion"

    def _object(self, kind: str, **more: Any) -> dict[str, Any]:
        return {
            "id": self.id, "object": kind, "created": self.created_s, "model": self.model,
            "system_fingerprint": self.fingerprint, **more,
        }  # fmt: skip


def event_of(value: Mapping[str, Any]) -> bytes:
    """Return an object as a server-sent event."""
    return b"data: " + encoded(value) + b"\n\n"


def encoded(value: Mapping[str, Any]) -> bytes:
    """Return an object as JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def model_object(name: str, created_s: int) -> dict[str, Any]:
    """Return a model as `/v1/models` lists it."""
    return {"id": name, "object": "model", "created": created_s, "owned_by": "edgefl"}
