"""Options of an agent that cannot be used are refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent.config import AgentConfig
from edgefl.errors import ConfigError

EVERYWHERE = "0.0.0.0"  # noqa: S104 - what a guard is for


@pytest.mark.parametrize(
    "wrong",
    [{"serve_port": 70000}, {"trainer_memory_mb": -1}, {"trainer_idle_s": -1.0}, {"trainer_idle_s": float("nan")},
     {"serve_memory_mb": -1}, {"model_load_s": 0},
     {"model_load_s": float("nan")}, {"serve_host": EVERYWHERE}, {"serve_token_file": Path("/none")},
     {"placement": "somewhere"}, {"stages": ["nowhere"]}, {"stages": ["host:0"]}],
)  # fmt: skip
def test_a_wrong_option_is_refused(wrong, tmp_path):
    with pytest.raises(ConfigError):
        AgentConfig(home=tmp_path, **wrong)
