"""Which rank a client's adapters have."""

from __future__ import annotations

from collections import Counter

import pytest

from edgefl.config import TrainConfig
from edgefl.errors import ConfigError, TaskError
from edgefl.training.adapters.ranks import loader_options, rank_of


def test_a_device_s_option_is_before_the_setting_and_the_setting_before_the_task() -> None:
    assert rank_of("t", TrainConfig(), {}, "a") is None
    assert rank_of("t", TrainConfig(lora_ranks=[4]), {"part": "1"}, "a") == 4
    assert rank_of("t", TrainConfig(lora_ranks=[4]), {"lora_rank": "7"}, "a") == 7
    with pytest.raises(TaskError, match="lora_rank='x' is no rank; expected a whole number from 1 to 4096"):
        rank_of("t", TrainConfig(), {"lora_rank": "x"}, "a")


def test_each_client_has_one_of_the_ranks_in_every_round() -> None:
    config = TrainConfig(lora_ranks=[4, 8], round=1)
    ranks = {f"c{number}": rank_of("t", config, {}, f"c{number}") for number in range(200)}
    assert {80 < count < 120 for count in Counter(ranks.values()).values()} == {True}
    later = TrainConfig(lora_ranks=[4, 8], round=2)
    assert {name: rank_of("t", later, {}, name) for name in ranks} == ranks


def test_the_option_is_not_for_the_loaders() -> None:
    assert loader_options({"part": "1", "lora_rank": "2"}) == {"part": "1"}
    assert loader_options({"part": "1"}) == {"part": "1"}


def test_a_setting_that_is_no_rank_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.lora_ranks"):
        TrainConfig(lora_ranks=[0])
