"""The API on a small model: responses, streams, stops, limits, and errors before and in the middle of a text."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest

from edge_agent.generation import endpoint as module
from edge_agent.generation.endpoint import OpenAiEndpoint, TextModel
from edge_agent.generation.text import TextCodec
from edge_agent.generation.wire import ResponseHead
from edgefl.offload.generation.sampling import Sampling
from edgefl.offload.generation.stage_info import read_stage

PROMPT = list(b"once upon a time")


class Sent:
    """What an endpoint sends."""

    def __init__(self) -> None:
        self.head, self.parts = None, []

    async def __call__(self, message) -> None:
        if isinstance(message, ResponseHead):
            assert self.head is None
            self.head = message
        else:
            self.parts.append(message)

    @property
    def json(self):
        return json.loads(b"".join(self.parts))

    @property
    def events(self):
        text = b"".join(self.parts).decode()
        return [one.removeprefix("data: ") for one in text.split("\n\n") if one]


@pytest.fixture
def endpoint(generating, folders):
    @contextlib.asynccontextmanager
    async def run():
        async with generating() as (generator, tail):
            info, made = read_stage(folders / "head"), OpenAiEndpoint()
            made.model = TextModel(info=info, codec=TextCodec(folders / "head", info), generator=generator)

            async def ask(method, path, **body):
                sent = Sent()
                await made.answer(method, path, json.dumps(body).encode(), sent)
                return sent

            yield made, tail, ask

    return run


@pytest.fixture
def text_of(expected, folders):
    def text(num):
        stream = TextCodec(folders / "head", read_stage(folders / "head")).decoding()
        return "".join([stream.add(one) for one in expected(PROMPT, num, Sampling())]) + stream.rest()

    return text


def completion(**more):
    return {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, **more}


def test_texts_whole_and_streamed_are_the_model_s(endpoint, text_of) -> None:
    async def run():
        async with endpoint() as (_, _tail, ask):
            whole = (await ask("POST", "/v1/completions", **completion())).json
            stream = await ask("POST", "/v1/completions", **completion(stream=True), stream_options={
                "include_usage": True})  # fmt: skip
            return whole, stream

    whole, stream = asyncio.run(run())
    assert whole["choices"][0]["text"] == text_of(12)
    assert whole["choices"][0]["finish_reason"] == "length"
    assert whole["usage"] == {"prompt_tokens": 16, "completion_tokens": 12, "total_tokens": 28}
    assert (stream.head.status, stream.head.type) == (200, "text/event-stream; charset=utf-8")
    *chunks, usage, done = stream.events
    assert done == "[DONE]"
    assert json.loads(usage)["usage"]["total_tokens"] == 28
    texts = [json.loads(one)["choices"][0] for one in chunks]
    assert "".join(one["text"] for one in texts) == text_of(12)
    assert [one["finish_reason"] for one in texts] == [None] * (len(texts) - 1) + ["length"]
    assert len(texts) > 4  # as the tokens arrive


def test_a_stop_text_and_an_end_token_end_a_text(endpoint, text_of, expected) -> None:
    text, third = text_of(12), expected(PROMPT, 3, Sampling())[2]
    stop = text[4:6]

    async def run():
        async with endpoint() as (made, tail, ask):
            stopped = (await ask("POST", "/v1/completions", **completion(stop=[stop]))).json
            num = len(tail.requests)
            made.model.codec.end_tokens = frozenset({third})
            return stopped, num, (await ask("POST", "/v1/completions", **completion())).json

    stopped, num, ended = asyncio.run(run())
    assert stopped["choices"][0] == {"index": 0, "text": text[: text.index(stop)], "logprobs": None,
                                     "finish_reason": "stop"}  # fmt: skip
    assert num < 13
    assert ended["choices"][0]["finish_reason"] == "stop"
    assert ended["usage"]["completion_tokens"] == 3


def test_a_chat_has_the_template_s_prompt(endpoint) -> None:
    async def run():
        async with endpoint() as (_, _tail, ask):
            body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "seed": 1}
            return (await ask("POST", "/v1/chat/completions", **body)).json

    made = asyncio.run(run())
    assert made["object"] == "chat.completion"
    assert made["choices"][0]["message"]["role"] == "assistant"
    assert made["usage"]["prompt_tokens"] == len("<user>hi\n<assistant>")


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code", "words"),
    [
        ("POST", "/v1/completions", completion(model="gpt-4"), 404, "model_not_found", "'gpt-4' does not exist"),
        ("GET", "/v1/models/gpt-4", {}, 404, "model_not_found", "this device has 'tiny'"),
        ("POST", "/v1/completions", completion(prompt=[1] * 250), 400, "context_length_exceeded",
         "maximum context length is 256 tokens. However, you requested 262"),
        ("POST", "/v1/completions", completion(prompt=[260]), 400, None, "one of 260 or more"),
        ("POST", "/v1/completions", completion(n=2), 400, None, "n = 2 is not supported"),
        ("GET", "/v1/completions", {}, 405, "method_not_allowed", "takes POST, not GET"),
        ("POST", "/v1/embeddings", {}, 404, "not_found", "there is no '/v1/embeddings'"),
    ],
)  # fmt: skip
def test_bad_requests_in_openai_s_form(endpoint, method, path, body, status, code, words) -> None:
    async def run():
        async with endpoint() as (_, _tail, ask):
            return await ask(method, path, **body)

    sent = asyncio.run(run())
    assert (sent.head.status, sent.json["error"]["code"]) == (status, code)
    assert words in sent.json["error"]["message"]


def test_models_are_listed(endpoint) -> None:
    async def run():
        async with endpoint() as (_, _tail, ask):
            return (await ask("GET", "/v1/models")).json, (await ask("GET", "/v1/models/tiny")).json

    listed, one = asyncio.run(run())
    assert (listed["object"], listed["data"], one["id"]) == ("list", [one], "tiny")


def test_a_tail_that_refuses_is_a_status_before_the_text_and_an_event_in_it(endpoint) -> None:
    async def run():
        async with endpoint() as (_, tail, ask):
            tail.faults = {0: ("RESOURCE_EXHAUSTED", "no room")}
            before = await ask("POST", "/v1/completions", **completion(stream=True))
            tail.faults = {len(tail.requests) + 6: ("INVALID_ARGUMENT", "bad values")}
            middle = await ask("POST", "/v1/completions", **completion(stream=True))
            return before, middle

    before, middle = asyncio.run(run())
    assert (before.head.status, before.json["error"]["code"]) == (429, "tail_full")
    assert middle.head.status == 200
    error = json.loads(middle.events[-1])["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "tail_refused")


def test_more_texts_than_fit_are_refused(endpoint, monkeypatch) -> None:
    monkeypatch.setattr(module, "MAX_WAITING", 2)

    async def run():
        async with endpoint() as (_, _tail, ask):
            return await asyncio.gather(*(ask("POST", "/v1/completions", **completion()) for _ in range(8)))

    statuses = [one.head.status for one in asyncio.run(run())]
    assert sorted(statuses) == [200] * 6 + [429] * 2


def test_a_model_that_is_not_there_is_told_why() -> None:
    async def run():
        made, sent = OpenAiEndpoint(), Sent()
        made.refusal = "it needs 668 MB; there are 512 MB"
        await made.answer("GET", "/v1/models", b"", sent)
        return sent

    sent = asyncio.run(run())
    assert (sent.head.status, sent.json["error"]["message"]) == (503, "it needs 668 MB; there are 512 MB")
