"""Text to tokens and back: conversations by the model's template, pieces of text as tokens arrive, stop texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgefl.errors import ConfigError, MissingExtra, ProtocolError
from edgefl.offload.generation.stage_info import TOKENIZER_FILE, StageInfo


class TextCodec:
    """The tokenizer of one model."""

    def __init__(self, folder: Path, info: StageInfo) -> None:
        try:
            from jinja2.sandbox import ImmutableSandboxedEnvironment
            from tokenizers import Tokenizer
        except ImportError as cause:
            raise MissingExtra("text generation", "generate") from cause
        try:
            self._tokenizer: Any = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
        except Exception as cause:  # the library raises bare Exceptions
            raise ConfigError(f"{folder / TOKENIZER_FILE} cannot be read: {cause}. Split the model again") from cause
        self._facts = info.text
        self.end_tokens = frozenset(info.text.end_tokens)
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise
        self._template = environment.from_string(info.text.chat_template) if info.text.chat_template else None

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, with those that the tokenizer adds."""
        tokens: list[int] = self._tokenizer.encode(text).ids
        return tokens

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the tokens of a conversation; raises ProtocolError if the model's template refuses it."""
        from jinja2 import TemplateError

        if self._template is None:
            raise ProtocolError("this model has no template for conversations; use /v1/completions")
        try:
            text = self._template.render(
                messages=list(messages), add_generation_prompt=True, bos_token=self._facts.bos_token,
                eos_token=self._facts.eos_token,
            )  # fmt: skip
        except (TemplateError, TypeError, ValueError) as cause:
            raise ProtocolError(f"the model's template refuses these messages: {cause}") from cause
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return tokens

    def decoding(self) -> TextStream:
        """Return what turns the tokens of one text into its pieces."""
        return TextStream(self._tokenizer)


def _raise(reason: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(reason)


class TextStream:
    """Tokens to text, piece by piece; a piece has whole characters only."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._begin = self._read = 0  # tokens that give the context of the next piece, and those that were read

    def add(self, token: int) -> str:
        """Return the text that a token completes."""
        self._tokens.append(token)
        known = self._tokenizer.decode(self._tokens[self._begin : self._read])
        text: str = self._tokenizer.decode(self._tokens[self._begin :])
        if len(text) <= len(known) or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""  # a part of a character
        self._begin, self._read = self._read, len(self._tokens)
        return text[len(known) :]

    def rest(self) -> str:
        """Return what no token completed any more."""
        known: str = self._tokenizer.decode(self._tokens[self._begin : self._read])
        text: str = self._tokenizer.decode(self._tokens[self._begin :])
        return text[len(known) :]


class StopTexts:
    """Lets text pass until the first of some texts; keeps back what may be its beginning."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [one for one in stops if one]
        self._held = ""
        self.is_over = False

    def feed(self, text: str) -> str:
        """Return what may be shown now."""
        if self.is_over:
            return ""
        held = self._held + text
        found = [at for at in (held.find(one) for one in self._stops) if at >= 0]
        if found:
            self.is_over, self._held = True, ""
            return held[: min(found)]
        kept = max((_overlap(held, one) for one in self._stops), default=0)
        self._held = held[len(held) - kept :]
        return held[: len(held) - kept]

    def rest(self) -> str:
        """Return what was kept back, at the end of the text."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return how many last characters of a text are the first of a stop text."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
