"""Exports compute what their source computes, at every batch, quietly, or leave no file."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edgefl.errors import ConfigError, ParityError, TaskError
from edgefl.models import packing
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


class NoTensor(nn.Module):
    def forward(self, x):
        return x, len(x)


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
        (NoTensor(), ParityError, "the model returns other than tensors: output_1 is a int; expected tensors"),
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


class TwoInputs(nn.Module):
    """A mean of embeddings over the tokens that count, and how many these are."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)

    def forward(self, tokens, mask):
        weights = mask.unsqueeze(-1)
        mean = (self.embedding(tokens) * weights).sum(1) / weights.sum(1)
        return {"scores": self.head(mean), "count": mask.sum(1)}


def pair(length=6, batch=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 20, (batch, length), generator=generator), torch.ones(batch, length)


def as_dict(length=6, batch=3):
    return dict(zip(("tokens", "mask"), pair(length, batch), strict=True))


def ends(path):
    session = open_session(path)
    return [[(one.name, [size if isinstance(size, int) else -1 for size in one.shape]) for one in side]
            for side in (session.get_inputs(), session.get_outputs())]  # fmt: skip


@pytest.mark.parametrize("examples", [pair, as_dict])
def test_several_inputs_and_outputs_keep_their_names(tmp_path, examples):
    cases = export_onnx(TwoInputs(), examples(), tmp_path / "m.onnx")
    assert ends(tmp_path / "m.onnx") == [
        [("tokens", [-1, 6]), ("mask", [-1, 6])], [("scores", [-1, 3]), ("count", [-1])],
    ]  # fmt: skip
    assert [{name: one.shape for name, one in case.items()} for case in cases] == [
        {"tokens": (1, 6), "mask": (1, 6)}, {"tokens": (3, 6), "mask": (3, 6)},
    ]  # fmt: skip


@pytest.mark.parametrize(
    "dynamic",
    [
        {"tokens": [0, 1], "mask": [1]},
        {"tokens": {1: "length"}, "mask": {1: "length"}},
        {"tokens": {0: torch.export.Dim("batch"), 1: torch.export.Dim("n")}, "mask": {1: torch.export.Dim("n")}},
    ],
)
def test_a_dynamic_dimension_is_free_in_the_file(tmp_path, dynamic):
    model = TwoInputs().eval()
    export_onnx(model, pair(), tmp_path / "m.onnx", dynamic=dynamic)
    assert ends(tmp_path / "m.onnx")[0] == [("tokens", [-1, -1]), ("mask", [-1, -1])]
    tokens, mask = pair(11, 5)
    with torch.no_grad():
        wanted = model(tokens, mask)["scores"]
    seen = open_session(tmp_path / "m.onnx").run(["scores"], {"tokens": tokens.numpy(), "mask": mask.numpy()})[0]
    assert np.allclose(seen, wanted, atol=1e-5)


class Counts(nn.Module):
    """Its second dimension becomes a number while it is traced."""

    def forward(self, x):
        return x * int(x.shape[1])


class Rolls(nn.Module):
    """A table of the size that it was made with."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return x + self.table


def test_a_dimension_that_the_exporter_froze_is_refused_with_its_name(tmp_path):
    with pytest.raises(ParityError, match=r"dimension 1 of input 'input' is declared dynamic, but the exporter froze"):
        export_onnx(Counts(), torch.ones(3, 6), tmp_path / "m.onnx", dynamic={"input": [1]})
    with pytest.raises(TaskError, match=r"'length' \(dimension 1 of input 'input'\) is .* runs at size 6 only"):
        export_onnx(Rolls(), torch.ones(3, 6), tmp_path / "m.onnx", dynamic={"input": {1: "length"}})
    assert list(tmp_path.iterdir()) == []


def test_weights_in_float16_and_float64_stay_what_they_are(tmp_path):
    for dtype, exact in ((torch.float16, np.float16), (torch.float64, np.float64)):
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).to(dtype)
        [case, _] = export_onnx(model, torch.ones(3, 4, dtype=dtype), tmp_path / "m.onnx")
        [output] = open_session(tmp_path / "m.onnx").run(None, case)
        assert (case["input"].dtype, output.dtype) == (exact, exact)


def test_weights_in_bfloat16_are_stored_as_such_and_computed_in_float32(tmp_path):
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    export_onnx(model, torch.ones(3, 64), tmp_path / "whole.onnx")
    half = model.to(torch.bfloat16)
    inputs = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    [_, case] = export_onnx(half, inputs, tmp_path / "half.onnx")
    [output] = open_session(tmp_path / "half.onnx").run(None, case)
    assert (case["input"].dtype, output.dtype) == (np.float32, np.float32)
    assert (tmp_path / "half.onnx").stat().st_size < 0.6 * (tmp_path / "whole.onnx").stat().st_size
    with torch.no_grad():
        assert np.allclose(output, half(inputs).float(), atol=0.02)


def test_what_onnx_runtime_cannot_compute_in_float64_is_refused_with_what_to_do(tmp_path):
    with pytest.raises(ParityError, match=r"ONNX Runtime cannot run .*Conv.* Keep the model in float32 instead of flo"):
        export_onnx(nn.Conv1d(1, 2, 2).double(), torch.ones(3, 1, 4).double(), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_no_onnx_file_can_hold_is_refused_before_it_is_traced(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "MAX_FILE_BYTES", 100)
    with pytest.raises(ConfigError, match=r"Linear has 120 bytes .* less than 2 GiB"):
        export_onnx(nn.Linear(5, 5), torch.ones(3, 5), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []
