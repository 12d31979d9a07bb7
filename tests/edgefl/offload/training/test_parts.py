"""What parts refuse: a trained tensor on both sides, batch norm in micro-batches."""

from __future__ import annotations

import pytest

from edgefl.errors import ConfigError
from edgefl.offload.training.decoder import decoder_parts
from edgefl.offload.training.parts import refuse_batch_norm, refuse_shared
from tests.edgefl.offload.training.models import NormedNet, SmallConvNet, decoder

TIED = frozenset({"model.embed_tokens.weight"})


def test_a_tied_weight_is_trained_on_one_side_or_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"model.embed_tokens.weight would be trained on the device and in the cloud"):
        refuse_shared(decoder_parts(decoder(), "1"), TIED, "task")
    refuse_shared(decoder_parts(decoder(), "1"), frozenset(), "task")  # frozen: both have a copy
    refuse_shared(decoder_parts(decoder(), "1", "2"), TIED, "task")  # both ends on the device


def test_batch_norm_needs_whole_batches() -> None:
    refuse_batch_norm(NormedNet(), 1)
    refuse_batch_norm(SmallConvNet(), 4)
    with pytest.raises(ConfigError, match="NormedNet has batch norm, whose statistics would be those of a micro-batch"):
        refuse_batch_norm(NormedNet(), 2)


def test_the_sides_of_three_parts() -> None:
    parts = decoder_parts(decoder(), "1", "2")
    assert parts.has_last
    assert set(parts.of_device()) & set(parts.of_cloud()) == set()
    assert all(".layers.1." in name for name in parts.of_cloud())
