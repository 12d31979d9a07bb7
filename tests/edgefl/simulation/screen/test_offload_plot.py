"""The picture of a plan."""

from __future__ import annotations

import pytest

from edgefl.errors import ConfigError
from edgefl.offload.leak import Leak
from edgefl.offload.plans.planner import predict
from edgefl.simulation.screen.offload_plot import write_offload_plot
from tests.edgefl.offload.plans.test_planner import CLOUD_MS, DEVICE_MS, LINK, OPTIONS


@pytest.mark.parametrize("leaks", [{}, {1: 0.9, 2: 0.3}])
def test_a_picture_is_drawn_in_any_format(tmp_path, leaks):
    cuts = predict(OPTIONS, DEVICE_MS, CLOUD_MS, LINK)
    told = {
        at: Leak(measure="SSIM", value=one, blind=0.1, attack="decoder", num_samples=8) for at, one in leaks.items()
    }
    write_offload_plot(cuts, cuts[1], {1: 3.0}, told, "a model", tmp_path / "p.svg")
    text = (tmp_path / "p.svg").read_text()
    assert text.count('<g id="axes_') == 2 + bool(leaks)
    assert "predicted, where measured" in text
    write_offload_plot(cuts, cuts[3], {}, told, "a model", tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="the extension must be one of"):
        write_offload_plot(cuts, cuts[0], {}, told, "a model", tmp_path / "p.doc")
