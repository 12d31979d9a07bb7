"""Exports compute what their source computes, at every batch, quietly, or leave no file."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edgefl.errors import ParityError, TaskError
from edgefl.models.export import check_parity, export_onnx, export_task
from edgefl.models.session import open_session
from edgefl.task import Task
from edgefl.training.local import initial_parameters


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(12, 4))


@pytest.fixture(scope="module")
def net():
    with torch.random.fork_rng(devices=[]):
        model = make_net()
        model[1].running_mean.normal_()  # training mode would give something else
    return model.train()


@pytest.fixture(scope="module")
def exported(net, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "net.onnx"
    export_onnx(net, torch.randn(1, 1, 4, 4), path)
    return path


def test_the_batch_is_free_and_the_names_are_ours(net, exported):
    session = open_session(exported)
    assert [(node.name, node.shape[1:]) for node in session.get_inputs()] == [("input", [1, 4, 4])]
    assert [(node.name, node.shape[1:]) for node in session.get_outputs()] == [("output", [4])]
    inputs = torch.randn(7, 1, 4, 4)
    with torch.no_grad():
        wanted = net.eval()(inputs)
    assert np.allclose(session.run(None, {"input": inputs.numpy()})[0], wanted, atol=1e-5)
    net.train()


def test_it_is_one_file_and_the_model_keeps_its_mode(net, exported):
    assert [path.name for path in exported.parent.iterdir()] == ["net.onnx"]
    onnx.checker.check_model(onnx.load(exported))
    assert net.training


def test_another_model_has_no_parity(net, exported):
    other = make_net().eval()
    with pytest.raises(ParityError, match=r"at batch 1 .* differs from its source by \d"):
        check_parity(other, exported, torch.randn(2, 1, 4, 4))


def test_nan_is_no_parity(net, exported):
    with pytest.raises(ParityError, match="differs from its source by nan"):
        check_parity(net.eval(), exported, torch.full((2, 1, 4, 4), torch.nan))
    net.train()


class FixedBatch(nn.Module):
    """Its trace holds the batch that it was traced with, which the exporter does not mind."""

    def forward(self, x):
        return x * len(x) if x.shape[0] > 1 else x


class DependsOnData(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class TwoOutputs(nn.Module):
    def forward(self, x):
        return x, x


class NeedsPairs(nn.Module):
    def forward(self, x):
        return x.view(2, -1)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (FixedBatch(), ParityError, "at batch 1 the exported model does not run"),
        (
            DependsOnData(),
            ParityError,
            r"cannot be exported to ONNX: .*a tensor's value .*test_export.py:\d+\)$",
        ),
        (
            nn.Linear(4, 1),
            TaskError,
            "task 'Linear': the model raised RuntimeError: .*2x3 and 4x1",
        ),
        (TwoOutputs(), (ParityError, TaskError), "expected one tensor|cannot be exported"),
        (NeedsPairs(), (ParityError, TaskError), "at batch 1"),
    ],
)
def test_models_that_cannot_be_exported_leave_nothing_and_say_little(tmp_path, capfd, model, error, message):
    with pytest.raises(error, match=message):
        export_onnx(model, torch.ones(2, 3), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_an_export_needs_an_example(tmp_path):
    with pytest.raises(TaskError, match="at least one example"):
        export_onnx(nn.Linear(3, 1), torch.ones(0, 3), tmp_path / "m.onnx")


def test_a_task_is_exported_with_its_parameters_quietly(tmp_path, capfd):
    task = Task(
        name="t",
        model=lambda: nn.Linear(3, 2),
        loss=nn.functional.cross_entropy,
        train_data=lambda: (np.ones((5, 3)), np.zeros(5, np.int64)),
    )
    parameters = {name: np.full_like(array, 0.5) for name, array in initial_parameters(task).items()}
    export_task(task, parameters, tmp_path / "t.onnx")
    (outputs,) = open_session(tmp_path / "t.onnx").run(None, {"input": np.ones((1, 3), np.float32)})
    assert outputs.tolist() == [[2.0, 2.0]]
    assert capfd.readouterr() == ("", "")


def test_a_task_without_a_model_cannot_be_exported(tmp_path):
    with pytest.raises(TaskError, match="has no model"):
        export_task(Task(name="own", initial=dict, fit=lambda *_: None), {}, tmp_path / "t.onnx")
