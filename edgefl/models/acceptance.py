"""Accepts a model for publishing: it is tried as a device will try it, in another process and an empty folder.

Invariant: an `Accepted` model has been loaded, and has run on its sample, by the code that devices use.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgefl.errors import ConfigError
from edgefl.models.sample import Case, Sample, write_sample
from edgefl.models.trial import ANSWER, SAMPLE
from edgefl.trees import Tree

WITHIN_S = 60.0  # what a device allows, too: `edgefl agent start --model-load-s`


@dataclass(frozen=True, kw_only=True, slots=True)
class Accepted:
    """What a release needs beside its model's file."""

    sample: Path
    inputs: Mapping[str, str]  # datatype and shape by name, such as FP32[-1,3]
    outputs: Mapping[str, str]
    notes: Sequence[str] = field(default_factory=list)


def accept(model: Path, sample: Path, cases: Sequence[Tree] = (), *, within_s: float = WITHIN_S) -> Accepted:
    """Try a model and write its sample to a file; raises ConfigError, in words, for a model that devices would refuse.

    `cases` are the inputs of the sample; if there are none, they are made from the declared types and shapes.
    """
    with tempfile.TemporaryDirectory(prefix="edgefl-trial-") as name:
        folder = Path(name)
        alone = folder / "empty"  # a device has only this file, under whatever path
        alone.mkdir()
        _link(model, alone / model.name)
        given = []
        if cases:
            write_sample(Sample(tuple(Case(one, {}) for one in cases), {}), folder / "given")
            given = ["--given", str(folder / "given")]
        command = [sys.executable, "-P", "-m", "edgefl.models.trial", "--model", str(alone / model.name)]
        command += [*given, "--out", str(folder), "--within-s", str(within_s)]
        try:
            ended = subprocess.run(command, cwd=alone, capture_output=True, timeout=within_s, check=False)
        except subprocess.TimeoutExpired as cause:
            raise ConfigError(
                f"{model.name} was not loaded and run within {within_s:g} s; devices wait as long by default "
                "(edgefl agent start --model-load-s). Publish a smaller model, or give a smaller --sample"
            ) from cause
        if ended.returncode != 0 or not (folder / ANSWER).exists():
            raise ConfigError(
                f"{model.name} cannot be served: the process that tried it {_end(ended.returncode)}; a device would "
                f"refuse it, too. {ended.stderr.decode(errors='replace').strip()[-500:]}".rstrip()
            )
        answer = json.loads((folder / ANSWER).read_text(encoding="utf-8"))
        if "error" in answer:
            raise ConfigError(answer["error"].replace(str(alone / model.name), model.name))
        shutil.move(folder / SAMPLE, sample)
    return Accepted(sample=sample, **answer)


def _link(model: Path, target: Path) -> None:
    try:
        os.link(model.resolve(), target)
    except OSError:  # another file system
        shutil.copyfile(model, target)


def _end(code: int) -> str:
    return f"ended with exit status {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
