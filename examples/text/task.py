"""Which keyword is missing in a piece of Python? A small transformer over tokens, on text that is on every machine.

The text is the source of Python's standard library, cut into tokens by Python's own tokenizer. A sample is a statement
in which one keyword is replaced by MASKED; the model says which it was. Statements have different lengths, so there
are two inputs: `tokens`, padded to the longest, and `mask`, which is true where there is a token.

A module's name decides where it belongs: a fifth of the modules is held out, the others are dealt to the devices, so
that parts never overlap, also if the devices have other versions of Python:

    edgefl agent start --data part=0 --data parts=3
"""

import io
import keyword
import sysconfig
import tokenize
import zlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgefl import Task

CLASSES = (
    "if", "return", "def", "for", "in", "not", "import", "else", "raise", "and",
    "is", "or", "elif", "try", "except", "class", "from", "with", "while", "as",
)  # fmt: skip
KINDS = ("NAME", "NUMBER", "STRING", "NEWLINE", "INDENT", "DEDENT")  # what is no keyword and no operator
OPERATORS = (
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    ",",
    ":",
    ".",
    "=",
    "==",
    "!=",
    "<",
    ">",
    "+",
    "-",
    "*",
    "**",
    "%",
    "@",
    "->",
)
PADDING, MASKED, OTHER = 0, 1, 2
VOCABULARY = {word: 3 + n for n, word in enumerate((*keyword.kwlist, *KINDS, *OPERATORS))}
LENGTH, WIDTH, HEADS, LAYERS = 32, 48, 4, 2
MAX_FILES, MAX_FILE_BYTES, SAMPLES_PER_FILE, HELD_OUT_OF = 100, 30_000, 40, 5

Batch = tuple[dict[str, np.ndarray], np.ndarray]


def tokens_of(source: str) -> list[int]:
    """Return the token ids of a piece of source; names are one token, as numbers and strings are."""
    found = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in {tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER}:
            kind = tokenize.tok_name[token.type]
            found.append(VOCABULARY.get(token.string, VOCABULARY.get(kind, OTHER)))
    return found


@cache  # a simulation calls the loaders once per client
def _modules() -> list[tuple[str, list[int]]]:
    """Return the names of modules and their tokens."""
    folder = Path(sysconfig.get_path("stdlib"))
    small = [path for path in folder.glob("*.py") if path.stat().st_size <= MAX_FILE_BYTES]
    files = sorted(small, key=lambda path: zlib.crc32(path.stem.encode()))[:MAX_FILES]
    return [(path.stem, tokens_of(path.read_text(encoding="utf-8", errors="replace"))) for path in files]


def _statements(tokens: list[int]) -> Iterator[list[int]]:
    """Yield the statements of a module, line by line, of 4 to LENGTH tokens."""
    begin = 0
    for end, token in enumerate(tokens, 1):
        if token == VOCABULARY["NEWLINE"]:
            if 4 <= end - begin <= LENGTH:
                yield tokens[begin:end]
            begin = end


def _samples(modules: Iterable[tuple[str, list[int]]]) -> Batch:
    """Return inputs {tokens (N, LENGTH), mask (N, LENGTH)} and the number of the masked keyword (N,)."""
    ids = {VOCABULARY[word]: number for number, word in enumerate(CLASSES)}
    rows, labels = [], []
    for name, tokens in modules:
        random = np.random.default_rng(zlib.crc32(name.encode()))
        statements = [one for one in _statements(tokens) if any(token in ids for token in one)]
        for chosen in random.permutation(len(statements))[:SAMPLES_PER_FILE]:
            statement = np.array(statements[chosen])
            places = [place for place, token in enumerate(statement) if token in ids]
            place = places[random.integers(len(places))]
            labels.append(ids[int(statement[place])])
            statement[place] = MASKED
            rows.append(np.pad(statement, (0, LENGTH - len(statement)), constant_values=PADDING))
    table = np.stack(rows) if rows else np.zeros((0, LENGTH), np.int64)
    return {"tokens": table, "mask": table != PADDING}, np.array(labels, np.int64)


def _number(name: str) -> int:
    return zlib.crc32(name.encode()) // 7


def load_part(part: str = "0", parts: str = "1") -> Batch:
    """Return this device's own samples."""
    own = [one for one in _modules() if _number(one[0]) % HELD_OUT_OF]
    return _samples(one for number, one in enumerate(own) if number % int(parts) == int(part))


def load_held_out() -> Batch:
    """Return samples of the modules on which no device trains."""
    return _samples(one for one in _modules() if _number(one[0]) % HELD_OUT_OF == 0)


class Block(nn.Module):
    """Attention over the tokens that there are, then two dense layers (Vaswani et al. 2017, norms first)."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attend, self.join = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.think = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(N, L, WIDTH) and (N, L) to (N, L, WIDTH)."""
        heads = self.attend(self.before(states)).unflatten(-1, (3, HEADS, WIDTH // HEADS))
        query, key, value = (one.squeeze(2).transpose(1, 2) for one in heads.split(1, dim=2))
        seen = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None, :])
        states = states + self.join(seen.transpose(1, 2).flatten(2))
        return states + self.think(self.between(states))


class Net(nn.Module):
    """A transformer that reads the whole statement and answers at the masked place: about 45,000 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.word = nn.Embedding(3 + len(VOCABULARY), WIDTH)
        self.place = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.classify = nn.Linear(WIDTH, len(CLASSES))

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(N, L) and (N, L) to scores (N, classes), for any L up to LENGTH."""
        states = self.word(tokens) + self.place(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            states = block(states, mask)
        asked = (tokens == MASKED).unsqueeze(-1)
        return self.classify((states * asked).sum(1))


def make_optimizer(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Make a device's optimizer for one round: transformers do not learn with plain SGD."""
    return torch.optim.Adam(parameters, lr=lr)


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Return the fraction of statements whose keyword is found."""
    return (outputs.argmax(1) == targets).float().mean().item()


task = Task(
    name="keywords",
    model=Net,
    loss=nn.functional.cross_entropy,
    optimizer=make_optimizer,
    train_data=load_part,
    test_data=load_held_out,
    metrics={"accuracy": accuracy},
    dynamic={"tokens": {1: "length"}, "mask": {1: "length"}},  # the served model takes statements of any length
)
