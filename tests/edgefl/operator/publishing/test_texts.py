"""Publishing a language model: what is uploaded, and what is refused before that."""

from __future__ import annotations

import dataclasses
import re
import shutil

import numpy as np
import pytest

from edgefl.errors import BlobDamaged, ConfigError, ProtocolError
from edgefl.models.adapters.patch import added, apply_patch
from edgefl.offload.generation.stage_info import (
    CHANGES_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    read_stage,
    sha256_of,
    write_stage,
)
from edgefl.operator.publishing.texts import TextRelease, publish_text
from edgefl.protocols.messages import BlobRef
from edgefl.trees import EncodedTree, Factors, SpooledTree, write_tree
from tests.language_models import write_stages


class Cloud:
    """Takes uploads, and what is published."""

    def __init__(self) -> None:
        self.blobs, self.published, self.texts = {}, [], {}

    def put_blob(self, file, sha256):
        self.blobs[sha256] = file.read()
        return BlobRef(sha256=sha256, size=len(self.blobs[sha256]))

    def publish(self, model, blob, metrics, **more):
        self.published.append((model, blob, more))
        self.texts[len(self.published)] = more["text"]
        return {"model": model, "version": len(self.published)}

    def model(self, name):
        return [
            {"model": name, "version": number, "blob": dataclasses.asdict(blob), "text": self.texts[number]}
            for number, (_, blob, _) in enumerate(self.published, 1)
        ]

    def get_blob(self, sha256, file):
        file.write(self.blobs[sha256])


@pytest.fixture
def folders(tmp_path):
    write_stages(tmp_path, 2, name="Tiny")
    write_stages(tmp_path, None, name="Tiny")
    return tmp_path


def test_three_files_go_up_and_the_release_says_where_the_tail_is(folders) -> None:
    cloud = Cloud()
    release = TextRelease(folder=folders / "head", tail="cloud.example.org:9460", form="bf16")
    assert publish_text(cloud, release) == {"model": "tiny", "version": 1, "note": ""}
    [(name, weights, more)] = cloud.published
    assert name == "tiny"  # in lower case, as releases are
    assert cloud.blobs[weights.sha256] == (folders / "head" / WEIGHTS_FILE).read_bytes()
    text = more["text"]
    assert cloud.blobs[text["tokenizer"]["sha256"]] == (folders / "head" / TOKENIZER_FILE).read_bytes()
    assert (text["tail"], text["form"]) == ("cloud.example.org:9460", "bf16")


def adapted(folders, weight="model.layers.0.self_attn.q_proj.weight"):
    """A head of the same model with an adapter on one weight."""
    rng = np.random.default_rng(1)
    into, tree = folders / "adapted", dict(SpooledTree(folders / "head" / WEIGHTS_FILE))
    shutil.copytree(folders / "head", into)
    pair = Factors(*(rng.normal(size=size).astype(np.float32) for size in ((32, 2), (2, 32))))
    tree[weight] = added(np.array(tree[weight]), pair)
    for name, stored in (
        (WEIGHTS_FILE, tree),
        (CHANGES_FILE, {f"{weight}@lora_B": pair.left, f"{weight}@lora_A": pair.right}),
    ):
        with (into / name).open("wb") as file:
            write_tree(EncodedTree(stored), file)
    write_stage(into, dataclasses.replace(read_stage(folders / "head"), digest=sha256_of(into / WEIGHTS_FILE)))
    return into


def test_adapters_go_up_as_a_patch_of_their_base(folders) -> None:
    cloud = Cloud()
    tail = {"tail": "cloud.example.org:9460"}
    publish_text(cloud, TextRelease(folder=folders / "head", **tail))
    found = publish_text(cloud, TextRelease(folder=adapted(folders), base=1, **tail))
    assert re.fullmatch(
        r"an adapter on version 1: a device that has it fetches \d KiB instead of \d+ KiB", found["note"]
    )
    _, weights, more = cloud.published[1]
    assert more["base"] == cloud.published[0][1]
    base, patch, made = (folders / name for name in ("b", "p", "m"))
    base.write_bytes(cloud.blobs[more["base"].sha256])
    patch.write_bytes(cloud.blobs[more["patch"].sha256])
    apply_patch(base, SpooledTree(patch), made)
    assert made.read_bytes() == cloud.blobs[weights.sha256]


def test_a_base_that_is_none_is_refused(folders) -> None:
    cloud, tail = Cloud(), {"tail": "cloud.example.org:9460"}
    publish_text(cloud, TextRelease(folder=folders / "head", **tail))
    same = publish_text(cloud, TextRelease(folder=folders / "head", base=1, **tail))  # all adapters are in the tail
    assert "fetches 0 KiB instead of" in same["note"]
    on_base = adapted(folders)
    with pytest.raises(ConfigError, match="tiny has no version 7"):
        publish_text(cloud, TextRelease(folder=on_base, base=7, **tail))
    publish_text(cloud, TextRelease(folder=folders / "whole"))
    write_stages(folders / "other", 2, name="Tiny", seed=4)
    publish_text(cloud, TextRelease(folder=folders / "other" / "head", **tail))
    for version in (3, 4):  # of another size, of other weights
        with pytest.raises(ConfigError, match=f"is not version {version} of tiny with adapters added to it: name the"):
            publish_text(cloud, TextRelease(folder=on_base, base=version, **tail))
    with pytest.raises(ConfigError, match="is not version 1 of tiny with adapters"):
        publish_text(cloud, TextRelease(folder=folders / "other" / "head", base=1, **tail))
    cloud.texts[1] = None
    with pytest.raises(ConfigError, match="version 1 of tiny is no language model"):
        publish_text(cloud, TextRelease(folder=on_base, base=1, **tail))
    assert len(cloud.published) == 4


@pytest.mark.parametrize(
    ("part", "more", "error", "words"),
    [
        ("head", {}, ConfigError, "its tail is needed, --tail"),
        ("whole", {"tail": "h:1"}, ConfigError, "leave out --tail"),
        ("tail", {"tail": "h:1"}, ConfigError, "a device takes the folder"),
        ("head", {"tail": "h"}, ProtocolError, "expected HOST:PORT"),
        ("whole", {"form": "int8"}, ConfigError, "--format 'int8' is not one of"),
        ("whole", {"name": "A b"}, ConfigError, "cannot be a model's name"),
        (".", {}, ConfigError, "is not a stage of a language model"),
    ],
)
def test_what_cannot_be_published(folders, part, more, error, words) -> None:
    with pytest.raises(error, match=words):
        TextRelease(folder=folders / part, **more)


def test_a_damaged_file_is_not_published(folders) -> None:
    with (folders / "whole" / WEIGHTS_FILE).open("ab") as file:
        file.write(b"x")
    with pytest.raises(BlobDamaged, match="has SHA-256"):
        TextRelease(folder=folders / "whole")
