"""Requests of OpenAI's API: what they mean, and what is refused instead of ignored."""

from __future__ import annotations

import json

import pytest

from edge_agent.generation.api_error import ApiError
from edge_agent.generation.requests import parse_request

HELLO = [{"role": "user", "content": "hello"}]


def chat(**given):
    return parse_request(json.dumps({"model": "m", "messages": HELLO, **given}).encode(), is_chat=True,
                         draw_seed=lambda: 77)  # fmt: skip


def completion(**given):
    return parse_request(json.dumps({"model": "m", "prompt": "x", **given}).encode(), is_chat=False,
                         draw_seed=lambda: 77)  # fmt: skip


def test_defaults_are_openai_s() -> None:
    one = chat()
    assert (one.model, one.messages, one.max_tokens, one.streams, one.stops) == ("m", HELLO, 512, False, ())
    assert (one.sampling.temperature, one.sampling.top_p, one.sampling.seed) == (1.0, 1.0, 77)
    assert (completion().max_tokens, completion().prompt) == (16, "x")


def test_all_that_is_supported() -> None:
    one = chat(
        max_completion_tokens=5, temperature=0, top_p=0.5, seed=3, stop=["a", "b"], stream=True, n=1, user="me",
        stream_options={"include_usage": True}, frequency_penalty=0, response_format={"type": "text"}, tools=None,
    )  # fmt: skip
    assert (one.max_tokens, one.stops, one.streams, one.with_usage) == (5, ("a", "b"), True, True)
    assert (one.sampling.temperature, one.sampling.top_p, one.sampling.seed) == (0.0, 0.5, 3)
    assert chat(stop="x").stops == ("x",)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "developer", "content": parts}]).messages == [{"role": "system", "content": "ab"}]
    assert [completion(prompt=one).prompt for one in (["a"], [1, 2], [[3]])] == ["a", [1, 2], [3]]


@pytest.mark.parametrize(
    ("given", "param", "words"),
    [
        ({"n": 2}, "n", "n = 2 is not supported by this server; leave it out"),
        ({"logprobs": True}, "logprobs", "is not supported"),
        ({"frequency_penalty": 1}, "frequency_penalty", "is not supported"),
        ({"tools": [{}]}, "tools", "is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "is not supported"),
        ({"prompt": "x"}, "prompt", "'prompt' is not a parameter of this request"),
        ({"temperature": 3}, "temperature", "temperature 3.0 must be from 0 to 2"),
        ({"temperature": "hot"}, "temperature", "must be a number"),
        ({"top_p": 0}, "top_p", "top_p 0.0 must be above 0"),
        ({"seed": 1.5}, "seed", "must be a whole number"),
        ({"max_tokens": 0}, "max_tokens", "from 1 to"),
        ({"stop": ["a"] * 5}, "stop", "a text or up to 4"),
        ({"stop": [""]}, "stop", "of 1 to 256 characters"),
        ({"stream": "yes"}, "stream", "must be true or false"),
        ({"stream_options": []}, "stream_options", "must be an object"),
        ({"model": None}, "model", "model must be given"),
        ({"messages": []}, "messages", "a list with one message at least"),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages[0]", "must have a role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "must be a text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "are not text"),
    ],
)
def test_bad_requests_are_refused_with_the_parameter(given, param, words) -> None:
    with pytest.raises(ApiError) as refused:
        chat(**given)
    error = refused.value.as_json()["error"]
    assert (refused.value.status, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert words in error["message"]


@pytest.mark.parametrize("prompt", [None, "", [], ["a", "b"], [1, -2], [True], {}])
def test_prompts_that_are_none(prompt) -> None:
    with pytest.raises(ApiError, match="prompt must be one text, or one list of tokens"):
        completion(prompt=prompt)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_bodies_that_are_no_object(body) -> None:
    with pytest.raises(ApiError, match="the body is not"):
        parse_request(body, is_chat=True)
