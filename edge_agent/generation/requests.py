"""Requests of the OpenAI API for completions, checked: https://platform.openai.com/docs/api-reference.

What would change the text and is not supported is refused, instead of being ignored.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from edge_agent.generation.api_error import ApiError
from edgefl.errors import ProtocolError
from edgefl.offload.generation.sampling import MAX_SEED, Sampling

CHAT_TOKENS, COMPLETION_TOKENS = 512, 16  # without max_tokens; the latter is OpenAI's
MAX_STOPS, MAX_STOP_CHARS = 4, 256
MAX_MESSAGES = 10_000
_ROLES = ("system", "developer", "user", "assistant")
# Parameters that change nothing here.
_IGNORED = frozenset({
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
})  # fmt: skip
# Parameters that are supported with these values alone.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "logprobs": (False, 0), "top_logprobs": (0,), "echo": (False,), "suffix": ("",),
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "tools": ([],), "tool_choice": ("none",),
    "functions": ([],), "function_call": ("none",), "response_format": ({"type": "text"},), "modalities": (["text"],),
}  # fmt: skip
_COMMON = frozenset({"model", "stream", "stream_options", "max_tokens", "temperature", "top_p", "seed", "stop"})


@dataclass(frozen=True, kw_only=True, slots=True)
class TextRequest:
    """A request for a chat's next message, or for the continuation of a text."""

    model: str
    is_chat: bool
    messages: list[Mapping[str, str]] = field(default_factory=list)  # of a chat: role and content
    prompt: str | list[int] = ""  # otherwise: text or tokens
    max_tokens: int
    sampling: Sampling
    stops: tuple[str, ...] = ()
    streams: bool = False
    with_usage: bool = False  # a last chunk of the stream with the usage


def parse_request(body: bytes, *, is_chat: bool, draw_seed: Callable[[], int] = lambda: secrets.randbelow(1 << 31)) -> (
    TextRequest
):  # fmt: skip
    """Return a checked request; raises ApiError."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as cause:
        raise ApiError(400, f"the body is not JSON: {cause}") from cause
    if not isinstance(value, dict):
        raise ApiError(400, "the body is not a JSON object")
    given = {name: one for name, one in value.items() if one is not None}
    _refuse_unknown(given, is_chat=is_chat)
    limit = "max_completion_tokens" if is_chat and "max_completion_tokens" in given else "max_tokens"
    options = given.get("stream_options", {})
    if not isinstance(options, dict):
        raise ApiError(400, "stream_options must be an object", param="stream_options")
    return TextRequest(
        model=_text(given, "model"), is_chat=is_chat, messages=_messages(given) if is_chat else [],
        prompt="" if is_chat else _prompt(given),
        max_tokens=_whole(given, limit, CHAT_TOKENS if is_chat else COMPLETION_TOKENS, 1, 1 << 24),
        sampling=_sampling(given, draw_seed), stops=_stops(given), streams=_flag(given, "stream"),
        with_usage=_flag(options, "include_usage"),
    )  # fmt: skip


def _refuse_unknown(given: Mapping[str, Any], *, is_chat: bool) -> None:
    own = {"messages", "max_completion_tokens"} if is_chat else {"prompt"}
    for name, value in given.items():
        if name in _NEUTRAL:
            if not any(value == one for one in _NEUTRAL[name]):
                raise ApiError(400, f"{name} = {value!r:.80} is not supported by this server; leave it out", param=name)
        elif name not in _COMMON | own | _IGNORED:
            raise ApiError(400, f"{name[:80]!r} is not a parameter of this request", param=name[:80])


def _messages(given: Mapping[str, Any]) -> list[Mapping[str, str]]:
    messages = given.get("messages")
    if not isinstance(messages, list) or not 0 < len(messages) <= MAX_MESSAGES:
        raise ApiError(400, "messages must be a list with one message at least", param="messages")
    return [_message(one, f"messages[{number}]") for number, one in enumerate(messages)]


def _message(message: Any, name: str) -> Mapping[str, str]:
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
        raise ApiError(400, f"{name} must have a role, one of: {', '.join(_ROLES)}", param=name)
    content = message.get("content")
    if isinstance(content, list):
        if not all(isinstance(one, dict) and one.get("type") == "text" for one in content):
            raise ApiError(400, f"{name}.content has parts that are not text", param=f"{name}.content")
        content = "".join(str(one.get("text", "")) for one in content)
    if not isinstance(content, str):
        raise ApiError(400, f"{name}.content must be a text", param=f"{name}.content")
    return {"role": "system" if message["role"] == "developer" else message["role"], "content": content}


def _prompt(given: Mapping[str, Any]) -> str | list[int]:
    prompt = given.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(prompt, list) and prompt and all(type(one) is int and one >= 0 for one in prompt):
        return prompt
    raise ApiError(400, "prompt must be one text, or one list of tokens", param="prompt")


def _sampling(given: Mapping[str, Any], draw_seed: Callable[[], int]) -> Sampling:
    numbers: dict[str, float] = {}
    for name in ("temperature", "top_p"):
        value = given.get(name, 1.0)
        if type(value) not in {int, float}:
            raise ApiError(400, f"{name} is {value!r:.80}; it must be a number", param=name)
        numbers[name] = float(value)
    seed = _whole(given, "seed", None, -MAX_SEED, MAX_SEED)
    try:
        return Sampling(**numbers, seed=draw_seed() if seed is None else seed & MAX_SEED)
    except ProtocolError as cause:
        raise ApiError(400, str(cause), param=str(cause).partition(" ")[0]) from cause


def _stops(given: Mapping[str, Any]) -> tuple[str, ...]:
    stops = given.get("stop", [])
    stops = [stops] if isinstance(stops, str) else stops
    fits = isinstance(stops, list) and len(stops) <= MAX_STOPS
    if not fits or not all(isinstance(one, str) and 0 < len(one) <= MAX_STOP_CHARS for one in stops):
        raise ApiError(400, f"stop must be a text or up to {MAX_STOPS}, of 1 to {MAX_STOP_CHARS} characters",
                       param="stop")  # fmt: skip
    return tuple(stops)


def _text(given: Mapping[str, Any], name: str) -> str:
    value = given.get(name)
    if not isinstance(value, str) or not value:
        raise ApiError(400, f"{name} must be given, as a text", param=name)
    return value


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if type(value) is not bool:
        raise ApiError(400, f"{name} must be true or false", param=name)
    return value


def _whole(given: Mapping[str, Any], name: str, default: Any, least: int, most: int) -> Any:
    value = given.get(name, default)
    if value is None:
        return None
    if type(value) is not int or not least <= value <= most:
        raise ApiError(400, f"{name} is {value!r:.80}; it must be a whole number from {least} to {most}", param=name)
    return value
