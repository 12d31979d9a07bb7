"""What a compressed model is judged by: the task's own metrics and their directions, accuracy, or the loss."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchmetrics
from onnx import TensorProto, helper
from sklearn.metrics import mean_absolute_error, r2_score
from torch import nn

from edgefl import Task
from edgefl.errors import AccuracyGateFailed, ConfigError, NotMeasurable
from edgefl.models.gate import OtherFile, accuracy_of, gate_of, split
from edgefl.operator.publish import compress_under_gate, export
from edgefl.training.local import initial_parameters
from edgefl.training.samples import test_samples as held_out
from edgefl.trees import write_tree

RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(512, 4)).astype(np.float32)


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


def exported(made, folder: Path, compression="none"):
    parameters = folder / "p.safetensors"
    with parameters.open("wb") as file:
        write_tree(initial_parameters(made), file)
    return export(made, parameters, folder, compression=compression, max_drop=1)


def in_int8(made, folder: Path, max_drop=0.02, gate=None):
    """The model in int8, although one so small does not become smaller."""
    return compress_under_gate(made, exported(made, folder).path, max_drop, gate)


REGRESSION = task(
    lambda: linear([1.0, 0.0, 0.0, 0.0]), nn.functional.mse_loss, INPUTS[:, :1] + np.float32(0.1),
    metrics={"mae": lambda outputs, targets: (outputs - targets).abs().mean()},
)  # fmt: skip


def judged_by_hand(path: Path, made, score):
    """A metric of what a file computes, on the samples that its gate uses."""
    _, samples = split(held_out(made, {}))
    inputs, targets = samples.inputs.numpy(), samples.targets.numpy()
    session = onnxruntime.InferenceSession(path)
    outputs = np.concatenate([session.run(None, {"input": inputs[n : n + 1]})[0] for n in range(len(inputs))])
    return score(targets, outputs)


def test_a_regression_is_judged_by_its_first_metric_and_published_with_what_was_measured(tmp_path):
    small = in_int8(REGRESSION, tmp_path, 0.05)
    assert (small.report["measure"], small.report["accuracy_before"]) == ("mae", None)
    assert small.metrics.keys() == {"loss", "mae", "before/loss", "before/mae"}
    assert small.metrics["mae"] == pytest.approx(judged_by_hand(small.path, REGRESSION, mean_absolute_error), rel=1e-5)
    before = judged_by_hand(tmp_path / "model.onnx", REGRESSION, mean_absolute_error)
    assert small.metrics["before/mae"] == small.report["before"] == pytest.approx(before, rel=1e-5)
    assert 0.08 < small.metrics["mae"] < 0.15  # 0.1 by construction


def test_targets_in_bfloat16_are_judged_too(tmp_path):
    inputs, targets = (torch.from_numpy(one).bfloat16() for one in (INPUTS, INPUTS[:, :1] + np.float32(0.1)))
    made = task(lambda: linear([1.0, 0.0, 0.0, 0.0]).bfloat16(), nn.functional.mse_loss, targets, inputs=inputs)
    small = in_int8(made, tmp_path, 0.05)
    assert small.report["measure"] == "loss"
    assert small.metrics["before/loss"] == pytest.approx(0.01, rel=0.1)  # 0.1 squared, by construction


R2 = replace(REGRESSION, metrics={"r2": torchmetrics.R2Score(), "mae": REGRESSION.metrics["mae"]})
RUINED = (RNG.normal(size=(256, 4)) * [1e4, 1e-2, 1, 1]).astype(np.float32)  # int8 cannot hold both ranges


def test_r2_is_that_of_the_served_file_and_a_ruined_one_is_refused(tmp_path):
    small = in_int8(R2, tmp_path, 0.01)
    assert small.report["measure"] == "r2"
    assert small.metrics["r2"] == pytest.approx(judged_by_hand(small.path, R2, r2_score), abs=1e-5)
    assert small.report["drop"] == small.report["before"] - small.report["after"]
    made = replace(
        task(lambda: linear([0.0, 100.0, 0.0, 0.0]), nn.functional.mse_loss, RUINED[:, 1:2] * 100, inputs=RUINED),
        metrics=R2.metrics,
    )
    with pytest.raises(AccuracyGateFailed, match=r"r2 goes from 1\.0000 to -?0\.0"):
        in_int8(made, tmp_path)


def test_the_metric_to_judge_by_can_be_named_and_what_is_lost_be_a_share_of_it(tmp_path):
    small = in_int8(R2, tmp_path, "20%", gate="mae")
    assert small.report["measure"] == "mae"
    assert small.report["drop"] == pytest.approx(small.report["after"] / small.report["before"] - 1)
    with pytest.raises(AccuracyGateFailed, match=r"by .* of the mae before; allowed: 1e-09"):
        in_int8(R2, tmp_path, "0.0000001%", gate="mae")
    with pytest.raises(ConfigError, match="has no metric 'f1' to judge by; it has loss, r2, mae"):
        in_int8(R2, tmp_path, gate="f1")
    with pytest.raises(ConfigError, match="whether a higher use is better is not known"):
        in_int8(replace(R2, metrics={"use": R2.metrics["mae"]}), tmp_path, gate="use")


def test_a_metric_without_a_direction_is_passed_over(tmp_path):
    made = replace(R2, metrics={"use": R2.metrics["mae"], "r2": torchmetrics.R2Score()})
    assert gate_of(made, exported(made, tmp_path).path).measure.name == "r2"


def test_what_calibrates_does_not_judge_and_few_samples_do_both():
    samples = held_out(R2, {})
    calibration, judging = split(samples)
    assert (len(calibration), len(judging)) == (102, 410)
    both = torch.cat([calibration.inputs, judging.inputs])
    assert torch.equal(both.sort(0).values, samples.inputs.sort(0).values)
    few = next(samples.chunks(9))
    assert [len(one) for one in split(few)] == [9, 9]


def test_a_file_that_int8_does_not_make_smaller_stays_as_it_is_and_says_so(tmp_path):
    found = exported(REGRESSION, tmp_path, "auto")
    assert found.path.name == "model.onnx"
    assert re.fullmatch(r"not compressed: int8 has \d+ bytes, not fewer than the \d+", found.note)


def test_int8_that_is_asked_for_and_not_smaller_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"does not make this model smaller: \d+ bytes instead of \d+ bytes\."):
        exported(REGRESSION, tmp_path, "int8")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_weights_in_other_types_are_published_as_they_are_and_refused_as_int8(tmp_path, dtype):
    def model():
        return nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 1)).to(dtype)

    inputs, targets = (torch.from_numpy(one).to(dtype) for one in (INPUTS, INPUTS[:, :1]))
    made = task(model, nn.functional.mse_loss, targets, inputs=inputs, metrics=REGRESSION.metrics)
    found = exported(made, tmp_path, "auto")
    assert found.path.name == "model.onnx"
    assert found.note.startswith("not compressed: int8 has ")
    with pytest.raises(ConfigError, match=r"its weights are in a type or a layer that has no form in int8\. Publish"):
        exported(made, tmp_path, "int8")


def test_the_share_lost_is_of_errors_in_the_targets_unit_by_hand(tmp_path):
    gate = gate_of(REGRESSION, exported(REGRESSION, tmp_path).path, "loss")
    judging = split(held_out(REGRESSION, {}))[1].inputs.numpy()
    blind = float(np.std(judging[:, 0]))  # the error of the mean output, but for the 0.1
    before, after = 0.1**2, 0.3**2
    share = (0.3 - 0.1) / (np.sqrt(blind**2 + 0.1**2) - 0.1)
    assert gate.measure.drop(before, after) == pytest.approx(share, rel=1e-3)
    assert gate.measure.drop(after, before) < 0


def test_a_loss_that_is_no_square_is_taken_as_it_is(tmp_path):
    made = task(lambda: linear([1.0, 0.0, 0.0, 0.0]), nn.functional.l1_loss, INPUTS[:, :1])
    gate = gate_of(made, exported(made, tmp_path).path)
    judging = split(held_out(made, {}))[1].inputs.numpy()
    blind = float(np.abs(judging[:, 0] - judging[:, 0].mean()).mean())
    assert gate.measure.drop(0.0, 0.5 * blind) == pytest.approx(0.5, rel=1e-3)


def test_a_regression_that_int8_ruins_is_refused(tmp_path):
    made = task(lambda: linear([0.0, 100.0, 0.0, 0.0]), nn.functional.mse_loss, RUINED[:, 1:2] * 100, inputs=RUINED)
    with pytest.raises(AccuracyGateFailed, match=r"loss goes from 0\.0000 to .* of what the model has learned"):
        in_int8(made, tmp_path)


def test_whole_numbers_are_no_classes_where_the_model_gives_one_number(tmp_path):
    targets = np.rint(INPUTS[:, :1]).astype(np.int64)
    made = task(lambda: linear([1.0, 0.0, 0.0, 0.0]), lambda o, t: nn.functional.mse_loss(o, t.float()), targets)
    gate = gate_of(made, exported(made, tmp_path).path)
    assert gate.measure.name == "loss"


def test_many_yes_and_no_answers_are_judged_by_their_loss(tmp_path):
    targets = (INPUTS[:, :2] > 0).astype(np.float32)
    made = task(lambda: linear([5.0, 0, 0, 0], [0, 5.0, 0, 0]), nn.functional.binary_cross_entropy_with_logits, targets)
    assert in_int8(made, tmp_path, 0.2).metrics.keys() == {"loss", "loss_rise", "before/loss"}


def test_the_accuracy_of_pictures_is_a_share_of_their_pixels(tmp_path):
    pictures = RNG.normal(size=(32, 1, 6, 6)).astype(np.float32)

    def model():
        layer = nn.Conv2d(1, 2, 1)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1))
            layer.bias.zero_()
        return layer

    made = task(model, nn.functional.cross_entropy, (pictures[:, 0] > 0).astype(np.int64), inputs=pictures)
    small = in_int8(made, tmp_path, 0.1)
    assert small.report["accuracy_before"] == 1.0
    assert 0.9 <= small.metrics["accuracy"] <= 1


def test_pixels_that_do_not_count_leave_it_to_the_loss(tmp_path):
    targets = (INPUTS[:, 0] > 0).astype(np.int64)
    targets[0] = -100
    made = task(lambda: linear([-3.0, 0, 0, 0], [3.0, 0, 0, 0]), nn.functional.cross_entropy, targets)
    assert in_int8(made, tmp_path, 0.2).report["measure"] == "loss"


def test_what_cannot_be_judged_is_refused_in_words(tmp_path):
    blind = task(lambda: linear([0.0, 0.0, 0.0, 0.0]), nn.functional.mse_loss, INPUTS[:, :1])
    with pytest.raises(NotMeasurable, match=r"has learned nothing yet.*or publish with --compress none"):
        exported(blind, tmp_path, "int8")
    assert "has learned nothing yet" in exported(blind, tmp_path, "auto").note
    without = Task(name="t", model=REGRESSION.model, loss=REGRESSION.loss, train_data=REGRESSION.train_data)
    with pytest.raises(NotMeasurable, match="has no test_data"):
        exported(without, tmp_path, "int8")
    assert "has no test_data" in exported(without, tmp_path, "auto").note
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


def made_elsewhere(made, folder: Path, name="other.onnx", **changes):
    """Its own export as a file of unknown origin, with changes of the graph's names."""
    model = onnx.load(exported(made, folder).path)
    for old, new in changes.items():
        for node in model.graph.node:
            node.input[:] = [new if one == old else one for one in node.input]
            node.output[:] = [new if one == old else one for one in node.output]
        for value in (*model.graph.input, *model.graph.output):
            value.name = new if value.name == old else value.name
    onnx.save(model, folder / name)
    return folder / name


def test_a_file_made_elsewhere_is_measured_by_all_test_data(tmp_path):
    file = OtherFile(REGRESSION, made_elsewhere(REGRESSION, tmp_path, input="x", output="y"))
    assert [len(case["x"]) for case in file.cases] == [1, 3]
    targets = INPUTS[:, 0] + np.float32(0.1)
    mae = mean_absolute_error(targets, INPUTS[:, 0])
    assert file.measured() == {"loss": pytest.approx(0.01, rel=1e-3), "mae": pytest.approx(mae, rel=1e-4)}


def test_a_file_that_a_task_cannot_measure_says_why(tmp_path):
    wider = task(lambda: linear([1.0] * 4, [0.0] * 4), nn.functional.mse_loss, INPUTS[:, :2])
    other = made_elsewhere(wider, tmp_path)
    with pytest.raises(ConfigError, match=r"other\.onnx returns \[2, 2\] where the model of task 't' returns \[2, 1\]"):
        OtherFile(REGRESSION, other).measured()
    narrow = task(lambda: nn.Linear(3, 1), nn.functional.mse_loss, INPUTS[:, :1], INPUTS[:, :3])
    with pytest.raises(ConfigError, match=r"other\.onnx does not run on test data of task 't'"):
        OtherFile(narrow, other).measured()
    with pytest.raises(NotMeasurable, match="has no test_data, so it cannot measure an ONNX file"):
        OtherFile(replace(REGRESSION, test_data=None), other)
    (tmp_path / "text.onnx").write_text("no model at all")
    with pytest.raises(ConfigError, match="is not an ONNX file"):
        OtherFile(REGRESSION, tmp_path / "text.onnx")


def test_several_inputs_of_a_file_made_elsewhere_have_the_tasks_names(tmp_path):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, left, right):
            return self.scale * (left + right)

    both = task(Sum, nn.functional.mse_loss, 2 * INPUTS, (INPUTS, INPUTS))
    assert OtherFile(both, made_elsewhere(both, tmp_path)).measured()["loss"] == 0
    with pytest.raises(ConfigError, match="has the inputs first, right; task 't' can measure a file with left, right"):
        OtherFile(both, made_elsewhere(both, tmp_path, left="first"))
