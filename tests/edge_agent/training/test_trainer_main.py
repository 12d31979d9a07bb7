"""The trainer child's own work, in this process; as a process it is in test_trainer."""

from __future__ import annotations

import dataclasses
import os
import resource
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from blake3 import blake3
from flwr.app import Message, RecordDict

from edge_agent.training import trainer_main as child
from edge_agent.training import trainer_wire as wire
from edgefl.config import TrainConfig
from edgefl.errors import TaskError
from edgefl.flower.fleet import wire as wire_of_flower
from edgefl.flower.internals import give_id, task_identity
from edgefl.records import DeviceEvaluation
from edgefl.task import FitResult
from edgefl.training.local import as_sent
from edgefl.trees import SpooledTree, read_tree, write_tree

PARAMETERS = {"w": np.zeros((2, 3), np.float32)}


def result(weight=1.0, metrics=None, **tree) -> FitResult:
    return FitResult(tree=tree or {"w": np.ones((2, 3), np.float32)}, weight=weight, metrics=metrics or {})


def fit_of(**changes) -> wire.FitRequest:
    facts = {
        "job": "j", "round": 1, "client": "c", "train": TrainConfig(), "model": "", "bundle": "", "task": "t:task",
        "options": {}, "out": "", "memory_limit_mb": 0,
    }  # fmt: skip
    return wire.FitRequest(**{**facts, **changes})


def test_an_update_is_written_over_old_bytes_and_hashed(tmp_path):
    path = tmp_path / "out"
    path.write_bytes(b"old" * 1000)
    tree = {"w": np.arange(500_000, dtype=np.float32), "scalar": np.float32(3).reshape(())}
    done = child.write("t", result(weight=2.0, metrics={"a": 0.5}, **tree), tree, fit_of(out=str(path)))
    data = path.read_bytes()
    assert (done.size, done.blake3) == (len(data), blake3(data).hexdigest())
    assert (done.weight, done.metrics) == (2.0, {"a": 0.5})
    assert all(np.array_equal(read_tree(data)[name], tree[name]) for name in tree)


@pytest.mark.parametrize(("form", "share"), [("bf16", 0.5), ("int8", 0.26)])
def test_an_update_is_written_in_the_form_that_is_asked_for(tmp_path, form, share):
    values = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    fit = fit_of(out=str(tmp_path / "out"), train=TrainConfig(wire=form))
    done = child.write("t", result(w=values), {"w": values}, fit)
    assert done.size < share * values.nbytes + 500
    sent = SpooledTree(tmp_path / "out")
    assert np.array_equal(sent["w"], as_sent({"w": values}, fit.train, fit.round, fit.client)["w"])
    assert np.abs(sent["w"] - values).max() < 0.05
    values[7] = 3.4e38  # finite, but not in bfloat16
    if form == "bf16":
        with pytest.raises(TaskError, match="tensor 'w' holds NaN or infinity"):
            child.write("t", result(w=values), {"w": values}, fit)


def test_a_state_is_written_beside_the_update_and_read_for_the_next_round(tmp_path):
    state = {"optimizer/0/step": np.float32(3).reshape(())}
    trained = dataclasses.replace(result(w=np.ones((2, 3), np.float32)), state=state)
    done = child.write("t", trained, PARAMETERS, fit_of(out=str(tmp_path / "out"), state_out=str(tmp_path / "state")))
    assert done.changed
    assert child.state_of(fit_of(state=str(tmp_path / "state")))["optimizer/0/step"] == 3
    assert child.state_of(fit_of()) is None


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (result(weight=0), "weight 0 must be finite"),
        (result(weight=float("nan")), "weight nan"),
        (result(metrics={"a": float("inf")}), "metric 'a' is inf"),
        (result(w=np.ones((1, 3), np.float32)), r"tensor 'w' is float32\[1, 3\], not float32\[2, 3\]"),
        (result(w=np.ones((2, 3))), "float64"),
        (result(v=np.ones((2, 3), np.float32)), "tensors missing: w"),
        (result(w=np.full((2, 3), np.nan, np.float32)), "tensor 'w' holds NaN or infinity"),
    ],
)
def test_what_the_cloud_would_refuse_does_not_travel(bad, said, tmp_path):
    with pytest.raises(TaskError, match=said):
        child.write("t", bad, PARAMETERS, fit_of(out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_out_of_memory_is_told_apart_however_deep():
    deep = TaskError("task 't': fit raised RuntimeError")
    deep.__cause__ = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    assert child.failure(deep, 512) == wire.WorkFailed(
        reason="the task exceeded its memory limit of 512 MB", spent=True
    )
    assert child.failure(MemoryError(), 0).spent
    assert child.failure(TaskError("why"), 512) == wire.WorkFailed(reason="why")
    assert child.failure(OSError(28, "No space left on device"), 512).reason.endswith("No space left on device")


def test_the_memory_limit_is_of_data():
    before = resource.getrlimit(resource.RLIMIT_DATA)
    try:
        child.limit_memory(1 << 20)
        assert resource.getrlimit(resource.RLIMIT_DATA)[0] == 1 << 40
        child.limit_memory(0)
        assert resource.getrlimit(resource.RLIMIT_DATA)[0] == before[1]
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def test_it_needs_a_socket():
    done = subprocess.run(
        [sys.executable, "-m", "edge_agent.training.trainer_main"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    done = subprocess.run(
        [sys.executable, "-m", child.__name__, "--listen-fds"], capture_output=True, text=True, check=False,
        env={**os.environ, "LISTEN_PID": "1"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "socket activation" in done.stderr


CLIENT = """
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

@app.query()
def count(message, context):
    context.state["seen"] = ConfigRecord({"n": 1})
    return Message(RecordDict(), reply_to=message)

@app.train()
def greedy(message, context):
    raise MemoryError
"""


@pytest.fixture
def request_for(tmp_path):
    """Return a function that makes a request for a small Flower app."""
    bundle = tmp_path / "bundle.zip"
    with zipfile.ZipFile(bundle, "w") as archive:
        archive.writestr("message_app.py", CLIENT)
        archive.writestr("pyproject.toml", '[tool.flwr.app.components]\nclientapp = "message_app:app"\n')

    def make(kind):
        with task_identity(1):
            message = Message(RecordDict(), 5, kind)
        give_id(message, "1-1")
        (tmp_path / "order").write_bytes(wire_of_flower.pack_order({}, message.content))
        return wire.DeliverRequest(
            app="message_app:app", order=str(tmp_path / "order"), envelope=wire_of_flower.pack_envelope(message),
            bundle=str(bundle), options={}, state="", state_out=str(tmp_path / "state"), out=str(tmp_path / "out"),
            memory_limit_mb=0,
        ), message  # fmt: skip

    return make


def test_a_message_ends_in_a_reply_and_a_state(request_for, tmp_path):
    (tmp_path / "out").write_bytes(b"old" * 1000)
    asked, message = request_for("query")
    done = child.deliver_message(asked)
    data = (tmp_path / "out").read_bytes()
    assert (done.size, done.blake3, done.changed) == (len(data), blake3(data).hexdigest(), True)
    assert not wire_of_flower.open_reply(data, message).has_error()
    assert wire_of_flower.open_state((tmp_path / "state").read_bytes())["seen"]["n"] == 1


def test_a_message_that_runs_out_of_memory_spends_the_trainer(request_for, tmp_path):
    with pytest.raises(TaskError) as raised:
        child.deliver_message(request_for("train")[0])
    assert child.failure(raised.value, 50).spent
    assert not (tmp_path / "state").exists()


EVALUATED = """
import numpy as np
from edgefl import EvalResult, FitResult, Task

def fit(parameters, config, options):
    return FitResult(tree={"w": np.ones(1, np.float32)}, weight=2.0)

def evaluate_locally(parameters, options):
    if options:
        raise ValueError("no\\ncard")
    return EvalResult(metrics={"gain": float(parameters["w"][0])}, weight=3)

task = Task(name="t", initial=lambda: {"w": np.zeros(1, np.float32)}, fit=fit, evaluate_locally=evaluate_locally)
"""


@pytest.fixture
def evaluated(tmp_path):
    """Return a function that makes the fields of a request for a task that evaluates parameters of 5."""
    bundle, model = tmp_path / "bundle.zip", tmp_path / "model"
    with zipfile.ZipFile(bundle, "w") as archive:
        archive.writestr("evaluated_task.py", EVALUATED)
    with model.open("wb") as file:
        write_tree({"w": np.full(1, 5, np.float32)}, file)
    return {"model": str(model), "bundle": str(bundle), "task": "evaluated_task:task", "out": str(tmp_path / "out")}


def test_an_evaluation_comes_with_the_update_and_its_failure_costs_no_update(evaluated, tmp_path):
    done = child.work(fit_of(**evaluated))
    assert (done.weight, done.evaluation) == (2.0, None)
    done = child.work(fit_of(**evaluated, evaluate=True))
    assert done.evaluation == DeviceEvaluation(metrics={"gain": 5.0}, weight=3.0)
    done = child.work(fit_of(**evaluated | {"options": {"card": "none"}}, evaluate=True))
    assert "evaluate_locally raised ValueError: no card" in done.evaluation.fault
    assert wire.parse(wire.frame(done)[wire.HEAD_BYTES :]) == done
    assert read_tree((tmp_path / "out").read_bytes())["w"].tolist() == [1.0]


def test_an_evaluation_alone_is_an_update_without_tensors(evaluated, tmp_path):
    request = wire.EvaluateRequest(client="c", seed=0, options={}, memory_limit_mb=0, **evaluated)
    assert wire.parse(wire.frame(request)[wire.HEAD_BYTES :]) == request
    done = child.work(request)
    data = (tmp_path / "out").read_bytes()
    assert (done.size, done.blake3, done.weight) == (len(data), blake3(data).hexdigest(), 0.0)
    assert not read_tree(data)
    assert done.evaluation == DeviceEvaluation(metrics={"gain": 5.0}, weight=3.0)


LINE = """
import torch
from edgefl import Task

def one():
    return torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)

task = Task(
    name="line", model=lambda: torch.nn.Linear(1, 1, dtype=torch.float64), loss=torch.nn.functional.mse_loss,
    train_data=one, eval_data=one,
)
"""


def test_with_fragments_the_global_model_is_evaluated_and_the_own_one_trained(tmp_path):
    """Round 2 of two fragments: the bias, 2, was changed by round 1; the weight, globally 3, is 50 on this device."""
    model, state, bundle = tmp_path / "model", tmp_path / "before", tmp_path / "bundle.zip"
    with zipfile.ZipFile(bundle, "w") as archive:
        archive.writestr("line_task.py", LINE)
    kept = {"own/weight": [[50.0]], "own/bias": [60.0], "base/weight": [[3.0]], "base/bias": [7.0]}
    for path, tree in ((model, {"bias": [2.0]}), (state, kept)):
        with path.open("wb") as file:
            write_tree({name: np.array(values) for name, values in tree.items()}, file)
    done = child.work(fit_of(
        train=TrainConfig(round=2, fragments=2, lr=1e-9), round=2, model=str(model), bundle=str(bundle),
        task="line_task:task", out=str(tmp_path / "out"), state=str(state), state_out=str(tmp_path / "after"),
        evaluate=True,
    ))  # fmt: skip
    assert done.evaluation.metrics["loss"] == 25.0  # (3 * 1 + 2 - 0) ** 2
    [(name, update)] = read_tree((tmp_path / "out").read_bytes()).items()
    assert name == "weight"
    np.testing.assert_allclose(update, [[47.0]], atol=1e-6)  # 50, trained with almost no rate, since 3
    after = read_tree((tmp_path / "after").read_bytes())
    np.testing.assert_allclose([after["own/weight"][0, 0], after["own/bias"][0]], [50.0, 2.0], atol=1e-6)
    assert (after["base/weight"].tolist(), after["base/bias"].tolist()) == ([[3.0]], [2.0])
