"""The stage of a language model is tried in a process of its own: what passes, and why others do not."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest

from edge_agent.generation.stage_trial import check_folder, run_stage
from edge_agent.releases.trial import try_stage
from edgefl.errors import EdgeflError, ProtocolError
from edgefl.offload.generation.stage_info import STAGE_FILE, TOKENIZER_FILE, WEIGHTS_FILE, sha256_of
from edgefl.trees import SpooledTree, write_tree
from tests.language_models import write_stages


@pytest.fixture
def folders(tmp_path):
    write_stages(tmp_path, 2)
    write_stages(tmp_path, None)
    return tmp_path


def test_good_ones_pass(folders) -> None:
    for part, tail in (("whole", ""), ("head", "host:1")):
        check_folder(folders / part, tail, 0)
        run_stage(folders / part)


@pytest.mark.parametrize(
    ("part", "tail", "memory_mb", "words"),
    [
        ("head", "", 0, "its tail is needed, publish it with --tail"),
        ("tail", "host:1", 0, "a device takes the folder `head`"),
        ("whole", "", 64, "needs about"),
    ],
)
def test_what_cannot_generate_here_says_why(folders, part, tail, memory_mb, words) -> None:
    with pytest.raises(EdgeflError, match=words):
        check_folder(folders / part, tail, memory_mb)


def test_a_stage_that_computes_nan_is_refused(folders) -> None:
    path = folders / "whole" / WEIGHTS_FILE
    tree = {name: np.array(one) for name, one in SpooledTree(path).items()}
    tree["model.layers.1.mlp.down_proj.weight"][:] = np.nan
    with path.open("wb") as file:
        write_tree(tree, file)
    _sign(folders / "whole")
    with pytest.raises(EdgeflError, match="computes NaN or infinity"):
        run_stage(folders / "whole")


def _sign(folder) -> None:
    record = json.loads((folder / STAGE_FILE).read_text())
    record |= {"digest": sha256_of(folder / WEIGHTS_FILE), "tokenizer_digest": sha256_of(folder / TOKENIZER_FILE)}
    (folder / STAGE_FILE).write_text(json.dumps(record))


@pytest.mark.parametrize("memory_mb", [8, 64])
def test_with_little_memory_its_process_says_what_is_needed(folders, memory_mb) -> None:
    """Also where the limit leaves no memory to say so."""
    with pytest.raises(ProtocolError, match=rf"needs about .* there are {memory_mb} MB"):
        asyncio.run(try_stage("tiny", 3, folders / "whole", tail="", memory_mb=memory_mb, within_s=60.0))


def test_in_its_process(folders) -> None:
    def tried(folder, tail="", within_s=60.0):
        asyncio.run(try_stage("tiny", 3, folder, tail=tail, memory_mb=0, within_s=within_s))

    tried(folders / "whole")
    with pytest.raises(ProtocolError, match="its tail is needed"):
        tried(folders / "head")
    (folders / "whole" / TOKENIZER_FILE).write_text("{}")
    _sign(folders / "whole")
    with pytest.raises(ProtocolError, match=r"tokenizer\.json cannot be read"):
        tried(folders / "whole")
    with pytest.raises(ProtocolError, match=r"model tiny version 3 was not loaded and run within 0\.01 s"):
        tried(folders / "head", "h:1", 0.01)
