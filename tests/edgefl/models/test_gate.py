"""What a compressed model is judged by: accuracy is one only for classes, all else is judged by the loss."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from edgefl import Task
from edgefl.errors import AccuracyGateFailed, ConfigError
from edgefl.models.gate import accuracy_of, gate_of
from edgefl.operator.publish import export
from edgefl.training.local import initial_parameters
from edgefl.trees import write_tree

RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(64, 4)).astype(np.float32)


def linear(*rows):
    """A layer of these weights."""
    layer = nn.Linear(4, len(rows))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(rows))
        layer.bias.zero_()
    return layer


def task(model, loss, targets, inputs=INPUTS, **more):
    return Task(
        name="t", model=model, loss=loss, train_data=lambda: (inputs, targets), test_data=lambda: (inputs, targets),
        **more,
    )  # fmt: skip


def exported(made, folder: Path, compression="none", max_drop=0.02):
    parameters = folder / "p.safetensors"
    with parameters.open("wb") as file:
        write_tree(initial_parameters(made), file)
    return export(made, parameters, folder, compression=compression, max_drop=max_drop)


REGRESSION = task(
    lambda: linear([1.0, 0.0, 0.0, 0.0]), nn.functional.mse_loss, INPUTS[:, :1] + np.float32(0.1),
    metrics={"mae": lambda outputs, targets: (outputs - targets).abs().mean()},
)  # fmt: skip


def test_a_regression_is_judged_by_its_loss_and_published_with_what_was_measured(tmp_path):
    small = exported(REGRESSION, tmp_path, "int8", max_drop=0.05)
    assert (small.report["measure"], small.report["accuracy_before"]) == ("loss", None)
    assert small.metrics.keys() == {"loss", "mae", "loss_rise"}
    outputs = np.asarray(gate_of(REGRESSION, small.path).evaluate(small.path)["mae"])
    assert small.metrics["mae"] == pytest.approx(float(outputs))
    assert 0.08 < small.metrics["mae"] < 0.15  # 0.1 by construction


def test_the_share_lost_is_of_errors_in_the_targets_unit_by_hand(tmp_path):
    gate = gate_of(REGRESSION, exported(REGRESSION, tmp_path).path)
    blind = float(np.std(INPUTS[:, 0]))  # the error of the mean output, but for the 0.1
    before, after = 0.1**2, 0.3**2
    share = (0.3 - 0.1) / (np.sqrt(blind**2 + 0.1**2) - 0.1)
    assert gate.measure.drop(before, after) == pytest.approx(share, rel=1e-3)
    assert gate.measure.drop(after, before) < 0


def test_a_loss_that_is_no_square_is_taken_as_it_is(tmp_path):
    made = task(lambda: linear([1.0, 0.0, 0.0, 0.0]), nn.functional.l1_loss, INPUTS[:, :1])
    gate = gate_of(made, exported(made, tmp_path).path)
    blind = float(np.abs(INPUTS[:, 0] - INPUTS[:, 0].mean()).mean())
    assert gate.measure.drop(0.0, 0.5 * blind) == pytest.approx(0.5, rel=1e-3)


def test_a_regression_that_int8_ruins_is_refused(tmp_path):
    inputs = (RNG.normal(size=(256, 4)) * [1e4, 1e-2, 1, 1]).astype(np.float32)
    made = task(lambda: linear([0.0, 100.0, 0.0, 0.0]), nn.functional.mse_loss, inputs[:, 1:2] * 100, inputs=inputs)
    with pytest.raises(AccuracyGateFailed, match=r"loss goes from 0\.0000 to .* of what the model has learned"):
        exported(made, tmp_path, "int8")


def test_whole_numbers_are_no_classes_where_the_model_gives_one_number(tmp_path):
    targets = np.rint(INPUTS[:, :1]).astype(np.int64)
    made = task(lambda: linear([1.0, 0.0, 0.0, 0.0]), lambda o, t: nn.functional.mse_loss(o, t.float()), targets)
    gate = gate_of(made, exported(made, tmp_path).path)
    assert gate.measure.name == "loss"


def test_many_yes_and_no_answers_are_judged_by_their_loss(tmp_path):
    targets = (INPUTS[:, :2] > 0).astype(np.float32)
    made = task(lambda: linear([5.0, 0, 0, 0], [0, 5.0, 0, 0]), nn.functional.binary_cross_entropy_with_logits, targets)
    assert exported(made, tmp_path, "int8", 0.2).metrics.keys() == {"loss", "loss_rise"}


def test_the_accuracy_of_pictures_is_a_share_of_their_pixels(tmp_path):
    pictures = RNG.normal(size=(32, 1, 6, 6)).astype(np.float32)

    def model():
        layer = nn.Conv2d(1, 2, 1)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1))
            layer.bias.zero_()
        return layer

    made = task(model, nn.functional.cross_entropy, (pictures[:, 0] > 0).astype(np.int64), inputs=pictures)
    small = exported(made, tmp_path, "int8", 0.1)
    assert small.report["accuracy_before"] == 1.0
    assert 0.9 <= small.metrics["accuracy"] <= 1


def test_pixels_that_do_not_count_leave_it_to_the_loss(tmp_path):
    targets = (INPUTS[:, 0] > 0).astype(np.int64)
    targets[0] = -100
    made = task(lambda: linear([-3.0, 0, 0, 0], [3.0, 0, 0, 0]), nn.functional.cross_entropy, targets)
    assert exported(made, tmp_path, "int8", 0.2).report["measure"] == "loss"


def test_what_cannot_be_judged_is_refused_in_words(tmp_path):
    blind = task(lambda: linear([0.0, 0.0, 0.0, 0.0]), nn.functional.mse_loss, INPUTS[:, :1])
    with pytest.raises(ConfigError, match="has learned nothing yet"):
        exported(blind, tmp_path, "int8")
    without = Task(name="t", model=REGRESSION.model, loss=REGRESSION.loss, train_data=REGRESSION.train_data)
    with pytest.raises(ConfigError, match="has no test_data"):
        exported(without, tmp_path, "int8")
    assert exported(without, tmp_path).metrics == {}


@pytest.fixture
def identity(tmp_path):
    """A file that returns its input, with names that are not ours."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 3]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", ends[:1], ends[1:])
    path = tmp_path / "identity.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def test_accuracy_by_hand(identity):
    inputs = np.eye(3, dtype=np.float32)
    assert accuracy_of(identity, inputs, np.array([0, 1, 0])) == pytest.approx(2 / 3)


def test_accuracy_over_many_batches(identity):
    targets = np.arange(1000) % 3
    inputs = np.eye(3, dtype=np.float32)[targets]
    targets[:250] = 5
    assert accuracy_of(identity, inputs, targets) == 0.75


def test_accuracy_needs_samples(identity):
    with pytest.raises(ConfigError, match="as many targets as inputs"):
        accuracy_of(identity, np.zeros((0, 3), np.float32), np.zeros(0))
    with pytest.raises(ConfigError, match="as many targets as inputs"):
        accuracy_of(identity, np.zeros((2, 3), np.float32), np.zeros(1))
