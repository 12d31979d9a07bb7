from flwr.app import ArrayRecord, MetricRecord

from edgefl.flower.inside import History, Result
from edgefl.flower.outcome import arrays_of, metrics_of


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


def test_the_last_results_arrays_count_and_a_history_has_none():
    first, last = result(arrays=ArrayRecord()), result(arrays=ArrayRecord())
    assert arrays_of([first, last, History()]) is last.arrays
    assert arrays_of([History()]) is None
