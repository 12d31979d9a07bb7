"""What a trainer needs for a round in parts; the rounds themselves are tested with real processes (tests/e2e)."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent.training.split.fit import train_in_parts
from edge_agent.training.trainer_wire import FitRequest
from edgefl.errors import ConfigError, TaskError
from tests.cloud.split.bench import settings
from tests.edgefl.offload.training.models import picture_task


def request_for(folder: Path, socket: str, **split: object) -> FitRequest:
    return FitRequest(
        client="cam-1",
        model="",
        bundle=str(folder / "bundle.zip"),
        task="m:task",
        options={},
        out="",
        memory_limit_mb=0,
        job="job-1",
        round=1,
        train=settings(dict(split)),
        split_socket=socket,
        split_kept=str(folder / "kept" / "one"),
    )


def test_an_agent_without_a_tunnel_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="gives the trainer no way to the cloud's part; update the agent"):
        train_in_parts(picture_task(), {}, request_for(tmp_path, ""), None, None)


def test_a_cut_that_the_model_lacks_is_a_fault_before_anything_is_sent(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no layer 'nowhere'"):
        train_in_parts(picture_task(), {}, request_for(tmp_path, "none", cut="nowhere"), None, None)


def test_tensors_of_another_cut_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"first.weight, first.bias is missing among the tensors of this part"):
        train_in_parts(picture_task(), {}, request_for(tmp_path, "none"), None, None)
