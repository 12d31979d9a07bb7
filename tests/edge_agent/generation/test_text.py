"""Tokens to text and back: whole characters, stop texts that arrive in pieces, conversations by a template."""

from __future__ import annotations

import dataclasses

import pytest

from edge_agent.generation.text import StopTexts, TextCodec
from edgefl.errors import ConfigError, ProtocolError
from edgefl.offload.generation.stage_info import TextFacts
from tests.language_models import write_stages


@pytest.fixture
def codec(tmp_path):
    info, _ = write_stages(tmp_path, 2)
    return TextCodec(tmp_path / "head", info)


def test_texts_are_tokens_and_pieces_of_whole_characters_again(codec) -> None:
    text = "naïve 🦊 text"
    tokens = codec.encode(text)
    assert len(tokens) == len(text.encode())
    stream = codec.decoding()
    pieces = [stream.add(token) for token in tokens]
    assert "".join(pieces) + stream.rest() == text
    assert "🦊" in pieces  # four tokens, one piece
    assert not any("\N{REPLACEMENT CHARACTER}" in one for one in pieces)


def test_a_character_that_is_never_completed_is_shown_at_the_end(codec) -> None:
    stream = codec.decoding()
    assert [stream.add(token) for token in codec.encode("🦊")[:2]] == ["", ""]
    assert "\N{REPLACEMENT CHARACTER}" in stream.rest()


def test_a_conversation_by_the_template(codec) -> None:
    tokens = codec.encode_chat([{"role": "user", "content": "hi"}])
    assert tokens == codec.encode("<user>hi\n<assistant>")


def test_templates_that_refuse_or_are_missing(tmp_path) -> None:
    info, _ = write_stages(tmp_path, 2)

    def codec_of(template):
        return TextCodec(tmp_path / "head", dataclasses.replace(info, text=TextFacts(chat_template=template)))

    with pytest.raises(ProtocolError, match="no template for conversations; use /v1/completions"):
        codec_of("").encode_chat([])
    with pytest.raises(ProtocolError, match="refuses these messages: no system here"):
        codec_of("{{ raise_exception('no system here') }}").encode_chat([])
    with pytest.raises(ProtocolError, match="refuses these messages"):
        codec_of("{{ ''.__class__.__mro__ }}").encode_chat([])  # the sandbox


def test_a_damaged_tokenizer_is_refused(tmp_path) -> None:
    info, _ = write_stages(tmp_path, 2)
    (tmp_path / "head" / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read"):
        TextCodec(tmp_path / "head", info)


@pytest.mark.parametrize(
    ("stops", "pieces", "shown"),
    [
        (["STOP"], ["abc", "dST", "OPe"], ["abc", "d"]),
        (["STOP"], ["abST", "AR"], ["ab", "STAR"]),
        (["ab", "b"], ["xa", "b"], ["x"]),
        ([], ["a", "b"], ["a", "b"]),
        (["\n\n"], ["a\n", "b\n", "\nc"], ["a", "\nb"]),
    ],
)
def test_stop_texts(stops, pieces, shown) -> None:
    filtering = StopTexts(stops)
    seen = [filtering.feed(one) for one in pieces]
    assert [one for one in [*seen, filtering.rest()] if one] == shown
    assert filtering.is_over == ("".join(shown) != "".join(pieces))
    assert filtering.is_over is False or filtering.feed("more") == ""
