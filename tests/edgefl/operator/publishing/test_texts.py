"""Publishing a language model: what is uploaded, and what is refused before that."""

from __future__ import annotations

import pytest

from edgefl.errors import BlobDamaged, ConfigError, ProtocolError
from edgefl.offload.generation.stage_info import TOKENIZER_FILE, WEIGHTS_FILE
from edgefl.operator.publishing.texts import TextRelease, publish_text
from edgefl.protocols.messages import BlobRef
from tests.language_models import write_stages


class Cloud:
    """Takes uploads, and what is published."""

    def __init__(self) -> None:
        self.blobs, self.published = {}, []

    def put_blob(self, file, sha256):
        self.blobs[sha256] = file.read()
        return BlobRef(sha256=sha256, size=len(self.blobs[sha256]))

    def publish(self, model, blob, metrics, **more):
        self.published.append((model, blob, more))
        return {"model": model, "version": len(self.published)}


@pytest.fixture
def folders(tmp_path):
    write_stages(tmp_path, 2, name="Tiny")
    write_stages(tmp_path, None, name="Tiny")
    return tmp_path


def test_three_files_go_up_and_the_release_says_where_the_tail_is(folders) -> None:
    cloud = Cloud()
    release = TextRelease(folder=folders / "head", tail="cloud.example.org:9460", form="bf16")
    assert publish_text(cloud, release) == {"model": "tiny", "version": 1}
    [(name, weights, more)] = cloud.published
    assert name == "tiny"  # in lower case, as releases are
    assert cloud.blobs[weights.sha256] == (folders / "head" / WEIGHTS_FILE).read_bytes()
    text = more["text"]
    assert cloud.blobs[text["tokenizer"]["sha256"]] == (folders / "head" / TOKENIZER_FILE).read_bytes()
    assert (text["tail"], text["form"]) == ("cloud.example.org:9460", "bf16")


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
