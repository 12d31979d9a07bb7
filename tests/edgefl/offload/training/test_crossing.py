"""Values and gradients as bytes: exact in fp32, scaled in fp16, never NaN."""

from __future__ import annotations

import pytest
import torch

from edgefl.errors import ProtocolError
from edgefl.offload import wire
from edgefl.offload.training.crossing import packed, packed_gradients, packed_targets, unpacked


def test_values_arrive_in_their_format() -> None:
    values = {"h": torch.tensor([[1.0, 1e-3]]), "tokens": torch.tensor([7])}
    assert torch.equal(unpacked(packed(values, "fp32"))["h"], values["h"])
    assert unpacked(packed(values, "fp16"))["tokens"].tolist() == [7]
    assert packed({}, "fp16") == b""
    assert unpacked(b"") == {}
    assert unpacked(packed_targets((torch.tensor([1.5]), torch.tensor([2]))))["target.1"].tolist() == [2]


def test_gradients_below_what_fp16_has_arrive_by_their_scale() -> None:
    gradients = {"h": torch.tensor([3e-9, -7e-9, 1e-10])}
    data, scale = packed_gradients(gradients, "fp16")
    assert scale == 2.0 ** round(torch.tensor(scale).log2().item())
    found = unpacked(data, scale=scale)["h"]
    assert torch.allclose(found, gradients["h"], rtol=1e-3, atol=0)
    assert unpacked(packed(gradients, "fp16"))["h"].tolist() == [0.0, 0.0, 0.0]  # without it, nothing is left
    assert packed_gradients({"h": torch.zeros(3)}, "fp16")[1] == 1.0
    huge = {"h": torch.tensor([1e30, 1.0])}
    data, scale = packed_gradients(huge, "fp16")
    assert torch.allclose(unpacked(data, scale=scale)["h"][:1], huge["h"][:1], rtol=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_on_both_sides(bad: float) -> None:
    with pytest.raises(ProtocolError, match="not finite"):
        packed_gradients({"h": torch.tensor([1.0, bad])}, "fp32")
    if bad == float("inf"):
        data = wire.encode({"h": torch.tensor([bad]).numpy()}, "fp32")
        with pytest.raises(ProtocolError, match=r"'h' float32\[1\] is not finite"):
            unpacked(data)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_hostile_scale_is_refused(scale: float) -> None:
    with pytest.raises(ProtocolError, match="the gradients' scale is"):
        unpacked(packed({"h": torch.ones(1)}, "fp32"), scale=scale)
