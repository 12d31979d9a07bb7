"""Models of several inputs and outputs, and of other floating-point types, from the task to what a device serves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edge_agent.sessions import load
from edgefl import Task
from edgefl.models.acceptance import accept
from edgefl.operator.publish import export
from edgefl.training.local import initial_parameters
from edgefl.trees import write_tree

RNG = np.random.default_rng(0)
INPUTS = {
    "image": RNG.normal(size=(120, 64)).astype(np.float32),
    "kind": RNG.integers(0, 4, size=(120,)),
}


class TwoHeads(nn.Module):
    """Two inputs, two outputs."""

    def __init__(self):
        super().__init__()
        self.body, self.kinds = nn.Linear(64, 256), nn.Embedding(4, 256)
        self.size, self.label = nn.Linear(256, 1), nn.Linear(256, 3)

    def forward(self, image, kind):
        hidden = torch.relu(self.body(image) + self.kinds(kind))
        return {"size": self.size(hidden), "label": self.label(hidden)}


def targets_of(model):
    with torch.no_grad():
        outputs = model(*(torch.from_numpy(one) for one in INPUTS.values()))
    return {"size": outputs["size"].numpy() + np.float32(0.01), "label": outputs["label"].argmax(1).numpy()}


def loss(outputs, targets):
    return nn.functional.mse_loss(outputs["size"], targets["size"]) + nn.functional.cross_entropy(
        outputs["label"], targets["label"]
    )


def label_accuracy(outputs, targets):
    return (outputs["label"].argmax(1) == targets["label"]).float().mean()


def exported(task: Task, folder: Path, compression: str):
    parameters = folder / "p.safetensors"
    with parameters.open("wb") as file:
        write_tree(initial_parameters(task), file)
    return export(task, parameters, folder, compression=compression, max_drop=0.1)


def test_two_inputs_and_outputs_are_compressed_judged_and_served(tmp_path):
    def make():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return TwoHeads()

    targets = targets_of(make())
    task = Task(
        name="heads", model=make, loss=loss, train_data=lambda: (INPUTS, targets),
        test_data=lambda: (INPUTS, targets), metrics={"accuracy": label_accuracy},
    )  # fmt: skip
    found = exported(task, tmp_path, "int8")
    assert (found.path.name, found.metrics["before/accuracy"]) == ("model.int8.onnx", 1.0)
    assert found.metrics["accuracy"] >= 0.9
    assert found.accepted.outputs == {"size": "FP32[-1,1]", "label": "FP32[-1,3]"}
    served = load("heads", 1, found.path, found.accepted.sample)
    feeds = {name: one[:5] for name, one in INPUTS.items()}
    [label] = served.run(["label"], feeds)
    assert label.argmax(1).tolist() == targets["label"][:5].tolist()


@pytest.mark.parametrize(
    ("dtype", "datatype"), [(torch.float16, "FP16"), (torch.bfloat16, "FP32"), (torch.float64, "FP64")]
)
def test_other_floating_point_types_are_exported_and_served(tmp_path, dtype, datatype):
    def make():
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)).to(dtype)

    inputs = torch.from_numpy(INPUTS["image"]).to(dtype)
    targets = torch.zeros(len(inputs), dtype=torch.int64)
    task = Task(
        name="half", model=make, loss=nn.functional.cross_entropy, train_data=lambda: (inputs, targets),
        test_data=lambda: (inputs, targets),
    )  # fmt: skip
    found = exported(task, tmp_path, "none")
    assert found.accepted.inputs == {"input": f"{datatype}[-1,64]"}
    served = load("half", 1, found.path, accept(found.path, tmp_path / "again").sample)
    assert served.output_types == {"output": datatype}
