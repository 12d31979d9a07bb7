"""What the processes tell each other; three of them run in `trained`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch.distributed as dist

from edgefl.errors import TaskError
from edgefl.training.parallel.workers import TrainingGroup


@pytest.fixture
def single(tmp_path: Path, monkeypatch) -> TrainingGroup:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    return TrainingGroup(dist.FileStore(str(tmp_path / "store"), 1), 0, 1, leads=True, host="127.0.0.1")


def test_an_alarm_reaches_the_leader_with_its_name(trained):
    assert (trained / "alarm").read_text() == "process 0 on 127.0.0.1: no more power"


def test_what_the_leader_sends_comes_out(single):
    assert single.broadcast(b"a request") == b"a request"
    assert single.broadcast(b"") == b""
    assert single.gather({"a": [1, "ü"]}) == [{"a": [1, "ü"]}]
    assert single.names == ["process 0 on 127.0.0.1"]


def test_a_fault_is_raised_with_the_name_of_its_process(single):
    single.agree({"model": "one"}, None)
    assert not single.refused
    with pytest.raises(TaskError, match=r"process 0 on 127\.0\.0\.1: no data"):
        single.agree({}, TaskError("no data"))
    assert single.refused


def test_the_environment_of_a_fit_is_its_own(single, monkeypatch):
    monkeypatch.setenv("RANK", "7")
    single.open("gloo")
    with single.environment():
        assert not dist.is_initialized()
        assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "1")
        described = json.loads(os.environ["TF_CONFIG"])
        assert described["task"] == {"type": "worker", "index": 0}
        assert len(described["cluster"]["worker"]) == 1
    assert os.environ["RANK"] == "7"
    assert "TF_CONFIG" not in os.environ
