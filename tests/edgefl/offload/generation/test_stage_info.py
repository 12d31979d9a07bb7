"""Records of stages: round trips, digests, and folders that are none."""

from __future__ import annotations

import dataclasses
import json

import pytest

from edgefl.errors import BlobDamaged, ConfigError
from edgefl.offload.generation.stage_info import STAGE_FILE, WEIGHTS_FILE, DecoderSpec, check_first, read_stage
from tests.language_models import SPEC, write_stages


def test_a_record_is_read_as_it_was_written_and_says_what_it_is(tmp_path) -> None:
    head, tail = write_stages(tmp_path, 1)
    assert read_stage(tmp_path / "head") == head
    assert (head.is_first, head.is_last, tail.is_first, tail.is_last) == (True, False, False, True)
    assert head.tail_digest == tail.digest
    assert head.what == "the head of tiny (blocks 0 to 1 of 4)"
    assert tail.what == "the tail of tiny (blocks 1 to 4 of 4)"
    (whole,) = write_stages(tmp_path, None)
    assert whole.what == "the whole model tiny"


def test_bytes_of_a_token_by_hand() -> None:
    assert SPEC.cache_bytes(3) == 3 * 2 * 2 * 8 * 4  # blocks, keys and values, heads, size, float32


def test_a_cut_at_the_end_leaves_norm_and_head(tmp_path) -> None:
    head, tail = write_stages(tmp_path, 4)
    assert (head.is_last, tail.is_last, tail.cache_bytes) == (False, True, 0)


def test_damaged_folders_are_refused(tmp_path) -> None:
    write_stages(tmp_path, 1)
    with pytest.raises(ConfigError, match="is not a stage of a language model"):
        read_stage(tmp_path)
    weights = tmp_path / "tail" / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(BlobDamaged, match=r"has SHA-256 .*, its stage.json says"):
        read_stage(tmp_path / "tail")
    weights.unlink()
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_stage(tmp_path / "tail")
    (tmp_path / "head" / "tokenizer.json").write_text("{}")
    with pytest.raises(BlobDamaged, match="tokenizer"):
        read_stage(tmp_path / "head")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 9}, "format 9, this version reads 1"),
        ({"start": 3}, "blocks 3 to 1 of 4"),
        ({"spec": {"hidden": 4}}, "missing 7 required"),
        ({"more": 1}, "unexpected keyword"),
    ],
)
def test_records_of_other_versions_are_refused(tmp_path, changes, words) -> None:
    write_stages(tmp_path, 1)
    path = tmp_path / "head" / STAGE_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConfigError, match=words):
        read_stage(tmp_path / "head")


@pytest.mark.parametrize(
    "changes", [{"heads": 3}, {"head_size": 7}, {"hidden": 0}, {"context": 1.5}, {"norm_epsilon": 2.0}]
)
def test_sizes_that_no_decoder_has_are_refused(changes) -> None:
    with pytest.raises(ConfigError):
        DecoderSpec(**dataclasses.asdict(SPEC) | changes)


def test_a_head_needs_a_tail_and_a_whole_model_none(tmp_path) -> None:
    write_stages(tmp_path, 2)
    write_stages(tmp_path, None)
    head, tail, whole = (read_stage(tmp_path / one) for one in ("head", "tail", "whole"))
    check_first(head, "host:1", "--tail")
    check_first(whole, "", "--tail")
    for info, given, words in (
        (head, "", "its tail is needed, --tail HOST:PORT"),
        (whole, "host:1", "which needs no tail: leave out --tail"),
        (tail, "host:1", "a device takes the folder `head`, or `whole`"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_first(info, given, "--tail")
