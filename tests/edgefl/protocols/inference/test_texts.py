"""How a language model is released: what travels, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest

from edgefl.errors import ProtocolError
from edgefl.protocols.fields import from_json, to_json
from edgefl.protocols.inference.texts import TextStage
from edgefl.protocols.manifest import Release, new_fleet_key, sign, verify
from edgefl.protocols.messages import BlobRef

REF = BlobRef(sha256="a" * 64, size=7)
STAGE = TextStage(record=REF, tokenizer=REF, tail="10.0.0.1:9460", form="bf16")


def test_it_is_part_of_the_signed_release() -> None:
    key = new_fleet_key()
    release = Release(model="tiny", version=1, blob=REF, text=STAGE)
    assert verify(sign(release, key), Release, key.public_key()) == release
    assert from_json(TextStage, to_json(STAGE)) == STAGE


def test_a_release_of_an_older_version_has_none() -> None:
    data = to_json(Release(model="m", version=1, blob=REF))
    del data["text"]
    assert from_json(Release, data).text is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tail": "host"}, "expected HOST:PORT"),
        ({"tail": "host:99999"}, "expected HOST:PORT"),
        ({"tail": "h" * 500 + ":1"}, "tail"),
        ({"form": "int8"}, "form is 'int8', expected one of: fp32, fp16, bf16"),
        ({"form": "x" * 99}, "form"),
    ],
)
def test_what_no_device_could_use(changes, words) -> None:
    with pytest.raises(ProtocolError, match=words):
        dataclasses.replace(STAGE, **changes)
