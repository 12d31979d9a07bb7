"""Parts of a decoder: made without weights, cut by blocks, with a tied head as one tensor."""

from __future__ import annotations

import pytest
import torch

from edgefl.errors import ConfigError
from edgefl.offload.training.bare import without_weights
from edgefl.offload.training.decoder import decoder_parts, is_decoder
from edgefl.offload.training.traced import input_values
from tests.edgefl.offload.training.models import SmallConvNet, decoder, tokens


def test_parts_of_a_bare_model_compute_the_model_with_its_state() -> None:
    whole = decoder().eval()
    with without_weights():
        bare = decoder()
    assert all(one.device.type == "meta" for one in bare.parameters())
    parts = decoder_parts(bare, "model.layers.0", "2")
    assert [len(part.tensors) for part in parts.parts] == [
        10,
        9,
        11,
    ]  # embedding + block | block | block, norm, tied head
    assert "model.embed_tokens.weight" in parts.parts[2].tensors
    values = input_values(tokens()[0][:3])
    state = {name: one.detach() for name, one in whole.state_dict().items()}
    for part in parts.parts:
        values |= part.run(state, values)
    assert torch.allclose(parts.outputs(values).logits, whole(tokens()[0][:3]).logits, atol=1e-5)


def test_cuts_that_it_does_not_have_are_refused() -> None:
    assert is_decoder(decoder())
    assert not is_decoder(SmallConvNet())
    for cut, last, reason in (
        ("9", "", "from 0 to 3"),
        ("2", "1", "growing order"),
        ("lm_head", "", "behind so many blocks"),
    ):
        with pytest.raises(ConfigError, match=reason):
            decoder_parts(decoder(), cut, last)
