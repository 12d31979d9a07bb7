import hashlib

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, MetricRecord

from edgefl.errors import ConfigError
from edgefl.flower.internals import History, Result
from edgefl.flower.outcome import arrays_of, metrics_of, write_arrays
from edgefl.trees import SpooledTree


def result(**parts):
    one = Result()
    for name, value in parts.items():
        setattr(one, name, value)
    return one


def test_a_results_parts_meet_in_their_round_and_lists_are_left_out():
    one = result(
        train_metrics_clientapp={1: MetricRecord({"train_loss": 0.5, "per_class": [1.0, 2.0]})},
        evaluate_metrics_serverapp={0: MetricRecord({"accuracy": 0.1}), 1: MetricRecord({"accuracy": 0.9})},
    )
    rounds = metrics_of([one])
    assert rounds[0] == {"accuracy": 0.1}
    assert rounds[1] == {"accuracy": 0.9, "train_loss": 0.5}


def test_a_legacy_history_says_the_same():
    history = History()
    history.add_loss_centralized(1, 0.25)
    history.add_metrics_centralized(1, {"accuracy": 0.75, "name": "text"})
    assert metrics_of([history])[1] == {"loss": 0.25, "accuracy": 0.75}


def test_the_last_model_that_there_is_counts():
    first, last = result(arrays=ArrayRecord([np.zeros(1)])), result(arrays=ArrayRecord([np.ones(1)]))
    assert arrays_of([first, last, History(), result()]) is last.arrays
    assert arrays_of([History(), result()]) is None


def test_a_model_is_written_as_it_is_and_what_cannot_be_is_said(tmp_path):
    arrays = ArrayRecord({"w": Array(np.arange(4, dtype=np.float32).reshape(2, 2))})
    told = write_arrays(arrays, tmp_path / "m.safetensors")
    assert told["sha256"] == hashlib.sha256((tmp_path / "m.safetensors").read_bytes()).hexdigest()
    assert SpooledTree(tmp_path / "m.safetensors")["w"].tolist() == [[0, 1], [2, 3]]
    with pytest.raises(ConfigError, match="cannot write the model to"):
        write_arrays(arrays, tmp_path / "none" / "m.safetensors")
