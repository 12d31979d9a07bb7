import pytest

from benchmarks.workload import Workload, between


def test_a_model_divides_into_its_tensors() -> None:
    assert Workload(clients=2, megabytes=0.1).model_bytes == 100_000
    assert Workload(clients=2, megabytes=0.00003).model_bytes == 16
    assert str(Workload(clients=10, megabytes=0.1)) == "10 x 0.1 MB"


def test_the_first_interval_stands_apart() -> None:
    assert between([1.0, 4.0, 5.0, 7.0]) == (3.0, (1.0, 2.0))


def test_no_rounds_is_no_result() -> None:
    with pytest.raises(IndexError):
        between([1.0])
