"""The digits example learns, from devices that each see other labels, what no device has seen."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from edgefl.aggregation.server_opt import ServerOptimizer
from edgefl.bundle import load_bundle, pack_bundle, unpack_bundle
from edgefl.config import JobConfig, load_config
from edgefl.errors import TaskError
from edgefl.models.compress import compress
from edgefl.models.export import export_task
from edgefl.models.gate import accuracy_of
from edgefl.records import Update
from edgefl.rounds import Job, run_rounds
from edgefl.task import load_task
from edgefl.testing import ScriptedFleet
from edgefl.training.evaluation import evaluate
from edgefl.training.local import buffer_names, initial_parameters, set_threads, train_locally

FOLDER = Path(__file__).parents[2] / "examples" / "digits"
PARTS = 3


@pytest.fixture(autouse=True)
def task(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    threads = torch.get_num_threads()
    set_threads(1)  # the fastest for so small a model
    yield load_task(str(FOLDER))
    set_threads(threads)


def part(task, index, **options):
    return task.train_data(part=str(index), parts=str(PARTS), **options)


def run(task, config, skew="0.8"):
    def device(index):
        def answer(plan):
            options = {"part": str(index), "parts": str(PARTS), "skew": skew}
            name = f"device{index}"
            fit = train_locally(task, plan.parameters, plan.train, options=options, round=plan.round, client=name)
            return Update(
                job=plan.job, round=plan.round, device=name, tree=fit.tree, weight=fit.weight, metrics=fit.metrics
            )

        return answer

    step = ServerOptimizer(config.server, gradient=config.train.algorithm == "fedsgd", buffers=buffer_names(task))
    fleet = ScriptedFleet({f"device{index}": device(index) for index in range(PARTS)})
    *_, last = run_rounds(Job(id="digits", config=config, step=step), fleet, initial_parameters(task))
    return last.parameters


@pytest.mark.parametrize("file", ["config.toml", "config-fedsgd.toml"])
def test_three_devices_of_skewed_labels_learn_the_held_out_fifth_and_it_survives_int8(task, tmp_path, file):
    parameters = run(task, load_config(JobConfig, FOLDER / file))
    accuracy = evaluate(task, parameters)["accuracy"]
    assert accuracy >= 0.96
    export_task(task, parameters, tmp_path / "digits.onnx")
    inputs, targets = task.test_data()
    assert accuracy_of(tmp_path / "digits.onnx", inputs, targets) == pytest.approx(accuracy, abs=1e-6)
    report = compress(
        tmp_path / "digits.onnx",
        tmp_path / "int8.onnx",
        calibration=part(task, 0)[0],
        evaluate=lambda path: accuracy_of(path, inputs, targets),
        max_drop=0.01,
    )
    assert report.target_bytes < 0.5 * report.source_bytes


def test_parts_are_skewed_disjoint_and_never_held_out(task):
    pictures = [part(task, index)[0] for index in range(PARTS)]
    held_out, _ = task.test_data()
    assert sum(map(len, pictures)) + len(held_out) == 1797
    assert len(held_out) == 360
    module = sys.modules["task"]
    cut = module.split_by_label(np.arange(100) % 10, PARTS, 0.8)
    assert sorted(np.concatenate(cut)) == list(range(100))
    for index in range(PARTS):
        counts = np.bincount(part(task, index)[1], minlength=10)
        assert np.sort(counts)[-4:].sum() > 0.75 * counts.sum()  # four labels make up most of a part


def test_skew_goes_from_even_parts_to_single_labels(task):
    even = np.bincount(part(task, 0, skew="0")[1], minlength=10)
    assert even.min() > 0.5 * even.mean()
    assert np.count_nonzero(np.bincount(part(task, 0, skew="1")[1], minlength=10)) <= 4


def test_the_same_options_give_the_same_part(task):
    assert np.array_equal(part(task, 1)[0], part(task, 1)[0])
    assert len(task.train_data()[0]) == 1437  # no options: all of it


def test_a_part_that_there_is_not(task):
    options, start = {"part": "3", "parts": "3"}, initial_parameters(task)
    with pytest.raises(TaskError, match=r"part=3 must be in 0\.\.2"):
        train_locally(task, start, JobConfig().train, options=options, round=1, client="a")


def test_it_travels_as_a_bundle(tmp_path):
    packed = pack_bundle(str(FOLDER))
    (tmp_path / "bundle.zip").write_bytes(packed.data)
    unpack_bundle(tmp_path / "bundle.zip", tmp_path / "there")
    assert load_bundle(tmp_path / "there", packed.task).name == "digits"
    assert Path(sys.modules["task"].__file__).parent == tmp_path / "there"
