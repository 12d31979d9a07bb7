"""The ONNX model that a task's own `export` makes: kept if it runs and predicts what the library predicts."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgefl import Task
from edgefl.errors import ConfigError, NotMeasurable, ParityError, TaskError
from edgefl.models.export import export_task
from edgefl.models.session import open_session
from edgefl.operator.publish import export
from edgefl.trees import write_tree

WEIGHTS = {"weights": np.array([[1.0], [2.0]], np.float32)}
ROWS = np.array([[1, 1], [2, 0], [0, 3], [4, 4]], np.float32)
PREDICTED = np.array([3, 2, 6, 12], np.float32)  # by hand


def linear(weights):
    """Return input (N, 2) times the weights, (N, 1)."""
    node = helper.make_node("MatMul", ["input", "weights"], ["output"])
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [None, 2])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, [None, 1])],
        [numpy_helper.from_array(weights, "weights")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def task_with(export, **more):
    return Task(name="own", initial=lambda: WEIGHTS, fit=lambda *_: None, export=export, **more)


def test_a_model_alone(tmp_path):
    for model in (lambda tree: linear(tree["weights"]), lambda tree: linear(tree["weights"]).SerializeToString()):
        assert export_task(task_with(model), WEIGHTS, tmp_path / "m.onnx") == []
        (seen,) = open_session(tmp_path / "m.onnx").run(None, {"input": ROWS})
        assert seen.ravel().tolist() == PREDICTED.tolist()


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [(ROWS, PREDICTED), ({"input": ROWS}, {"output": PREDICTED[:, None]}), (ROWS, PREDICTED.astype(int))],
)
def test_a_model_with_what_the_library_predicts_also_gives_the_releases_sample(tmp_path, inputs, outputs):
    task = task_with(lambda tree: (linear(tree["weights"]), inputs, outputs))
    one, three = export_task(task, WEIGHTS, tmp_path / "m.onnx")
    assert one["input"].tolist() == ROWS[:1].tolist()
    assert three["input"].tolist() == ROWS[:3].tolist()


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        ((linear(WEIGHTS["weights"]), ROWS, PREDICTED + 0.1), ParityError, "'output' is not what the library predicts"),
        ((linear(WEIGHTS["weights"]), ROWS, PREDICTED * np.nan), ParityError, "it differs by nan"),
        ((linear(WEIGHTS["weights"]), ROWS, PREDICTED[:2]), ParityError, r"shape \[4, 1\], the prediction \[2\]"),
        ((linear(WEIGHTS["weights"]), ROWS, np.array([3, 2, 6, 13])), ParityError, "1 of 4 values differ"),
        ((linear(WEIGHTS["weights"]), ROWS.astype(int), PREDICTED), ParityError, "does not run on export's inputs"),
        ((linear(WEIGHTS["weights"]), {"x": ROWS}, PREDICTED), TaskError, "for the input 'x'; the model has input"),
        ((linear(WEIGHTS["weights"]), {}, PREDICTED), TaskError, "no array for the model's input 'input'"),
        ((linear(WEIGHTS["weights"]), ROWS), TaskError, "export returned 2 values"),
        ((linear(WEIGHTS["weights"]), ROWS[:0], PREDICTED[:0]), TaskError, "at least one sample"),
        ((linear(WEIGHTS["weights"]), 3.0, PREDICTED), TaskError, "expected an array with a row"),
        ("model.onnx", TaskError, "export returned a str; expected an ONNX model"),
        (b"", TaskError, "export returned 0 bytes"),
        (b"no model", TaskError, "export returned no ONNX model that can be run"),
        (None, TaskError, "a NoneType"),
    ],
)
def test_what_is_refused_leaves_no_file(tmp_path, returned, error, message):
    with pytest.raises(error, match=message):
        export_task(task_with(lambda _tree: returned), WEIGHTS, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_export_is_the_users(tmp_path):
    with pytest.raises(TaskError, match=rf"task 'own': export raised KeyError: 'bias' \({__file__}:\d+\)"):
        export_task(task_with(lambda tree: tree["bias"]), WEIGHTS, tmp_path / "m.onnx")


def test_a_library_that_is_missing_is_told_with_how_to_install_it(tmp_path):
    def export(_tree):
        raise ModuleNotFoundError("No module named 'skl2onnx'", name="skl2onnx")

    with pytest.raises(TaskError, match=r"export raised ModuleNotFoundError.*\. Install it: .*pip install .*examples"):
        export_task(task_with(export), WEIGHTS, tmp_path / "m.onnx")


def test_export_belongs_to_a_task_with_fit():
    with pytest.raises(ConfigError, match="export belongs to a task with fit"):
        Task(name="t", model=dict, loss=print, train_data=print, export=print)  # type: ignore[arg-type]


def test_it_is_published_uncompressed_with_the_tasks_metrics(tmp_path):
    with (tmp_path / "parameters").open("wb") as file:
        write_tree(WEIGHTS, file)
    task = task_with(
        lambda tree: (linear(tree["weights"]), ROWS, PREDICTED),
        evaluate=lambda tree: {"r2": float(tree["weights"][1, 0])},
    )
    exported = export(task, tmp_path / "parameters", tmp_path, compression="auto", max_drop=0.02)
    assert exported.metrics == {"r2": 2.0}
    assert "not compressed" in exported.note
    assert exported.accepted is not None
    assert exported.accepted.inputs == {"input": "FP32[-1,2]"}
    assert onnx.load(exported.path).graph.name == "linear"
    with pytest.raises(NotMeasurable, match="or publish with --compress none"):
        export(task, tmp_path / "parameters", tmp_path, compression="int8", max_drop=0.02)
