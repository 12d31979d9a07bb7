"""Responses that the openai package's own types read."""

from __future__ import annotations

import json

import pytest

from edge_agent.generation.responses import TextReply, Usage, event_of, model_object

USAGE = Usage(prompt=3, completion=4)


def reply(*, is_chat):
    return TextReply(id="i", model="m", created_s=5, fingerprint="fp_1", is_chat=is_chat)


def of(event):
    assert event.startswith(b"data: ")
    assert event.endswith(b"\n\n")
    return json.loads(event[6:])


def test_whole_responses_are_openai_s() -> None:
    types = pytest.importorskip("openai.types")
    chat = types.chat.ChatCompletion.model_validate(reply(is_chat=True).whole("hi", "stop", USAGE), strict=True)
    assert (chat.choices[0].message.content, chat.choices[0].finish_reason) == ("hi", "stop")
    assert (chat.usage.prompt_tokens, chat.usage.completion_tokens, chat.usage.total_tokens) == (3, 4, 7)
    text = types.Completion.model_validate(reply(is_chat=False).whole("hi", "length", USAGE), strict=True)
    assert (text.choices[0].text, text.object) == ("hi", "text_completion")
    assert types.Model.model_validate(model_object("m", 5), strict=True).id == "m"


def test_chunks_are_openai_s() -> None:
    types = pytest.importorskip("openai.types")
    one = reply(is_chat=True)
    first, middle, last, usage = (
        types.chat.ChatCompletionChunk.model_validate(of(event), strict=True)
        for event in (one.chunk("a", begins=True), one.chunk("b"), one.chunk("", "stop"), one.usage_chunk(USAGE))
    )
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "a")
    assert (middle.choices[0].delta.role, middle.choices[0].delta.content) == (None, "b")
    assert (last.choices[0].delta.content, last.choices[0].finish_reason) == (None, "stop")
    assert (usage.choices, usage.usage.total_tokens) == ([], 7)
    assert of(reply(is_chat=False).chunk("b"))["choices"][0]["text"] == "b"


def test_events_keep_letters_of_all_scripts() -> None:
    assert event_of({"text": "é\n🦊"}) == 'data: {"text":"é\\n🦊"}\n\n'.encode()
