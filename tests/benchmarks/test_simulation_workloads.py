import numpy as np
import pytest

from benchmarks import simulation_workloads
from benchmarks.simulation_workloads import DATA_VARIABLE, WORKLOADS, digits_held_out, digits_part
from edgefl.task import load_task


def num_parameters(workload) -> int:
    return sum(parameter.numel() for parameter in workload.task.model().parameters())


def test_sizes_by_hand() -> None:
    sizes = {name: num_parameters(workload) for name, workload in WORKLOADS.items()}
    assert sizes == {
        "digits-cnn": 101_626,
        "digits-mlp": 104_842,
        "digits-lr": 650,
        "cifar": 1_626_442,
        "mnist-lr": 7_850,
    }


def test_a_part_depends_on_its_number_alone() -> None:
    inputs, labels = digits_part("7", "1000")
    again, _ = digits_part("7", "1000000")
    other, _ = digits_part("8", "1000")
    assert (inputs.shape, labels.shape) == ((48, 1, 8, 8), (48,))
    assert np.array_equal(inputs, again)
    assert not np.array_equal(inputs, other)


def test_no_client_has_a_held_out_sample() -> None:
    held_out = {picture.tobytes() for picture in digits_held_out()[0]}
    everything = {picture.tobytes() for picture in digits_part()[0]}
    assert len(digits_part()[1]) == 1437
    assert held_out.isdisjoint(everything)


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_worker_process_finds_the_task_again(name) -> None:
    assert load_task(WORKLOADS[name].reference) is WORKLOADS[name].task


def test_data_that_are_not_there_are_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    assert WORKLOADS["digits-cnn"].missing() is None
    assert f"there is no cifar10 in the data folder; set {DATA_VARIABLE}" in WORKLOADS["cifar"].missing()
    (tmp_path / "mnist10k.npz").touch()
    assert WORKLOADS["mnist-lr"].missing() is None


def test_cifar_is_decoded_and_dealt_once_to_each(tmp_path, monkeypatch) -> None:
    images = np.arange(2000 * 3 * 32 * 32, dtype=np.uint32).astype(np.uint8).reshape(2000, 3, 32, 32)
    np.save(tmp_path / "train-images.npy", images)
    np.save(tmp_path / "train-labels.npy", np.arange(2000))
    monkeypatch.setenv(simulation_workloads.DECODED_VARIABLE, str(tmp_path))
    simulation_workloads._cifar.cache_clear()
    parts = [simulation_workloads.cifar_part(str(part), "1000")[1] for part in range(1000)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(2000))
    simulation_workloads._cifar.cache_clear()
