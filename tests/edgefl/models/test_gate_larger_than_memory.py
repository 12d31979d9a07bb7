"""A test set that is a Dataset is judged by chunks: a process that holds a small part of it compresses and measures."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from edgefl import Task
from edgefl.errors import NotMeasurable
from edgefl.models.export import export_task
from edgefl.models.gate import gate_of, split
from edgefl.operator.publish import compress_under_gate
from edgefl.training.local import initial_parameters, make_model
from edgefl.training.samples import test_samples as held_out

JUDGING = """
    import resource
    import sys
    from pathlib import Path

    import numpy as np
    import torch
    from torch import nn

    from edgefl import Task
    from edgefl.models.export import export_task
    from edgefl.operator.publish import compress_under_gate
    from edgefl.training.local import initial_parameters

    WIDTH, NUMBER = 1 << 15, int(sys.argv[2])  # 128 kB per sample, in float32

    class Lazy(torch.utils.data.Dataset):
        def __len__(self):
            return NUMBER

        def __getitem__(self, n):
            return np.full(WIDTH, n % 5, np.float32), np.full(1, n % 5, np.float32)

    class MeanOfEight(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 1)
            nn.init.constant_(self.layer.weight, 1 / 8)
            nn.init.constant_(self.layer.bias, 0.1)

        def forward(self, samples):
            return self.layer(samples[:, :8])

    task = Task(name="lazy", model=MeanOfEight, loss=nn.functional.mse_loss, train_data=Lazy, test_data=Lazy)
    path = Path(sys.argv[1]) / "model.onnx"
    export_task(task, initial_parameters(task), path)
    made = compress_under_gate(task, path, 1.0, None)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(made.report["measure"], round(made.metrics["before/loss"], 4), peak_mb)
"""


def judged(folder, number: int) -> tuple[str, float, int]:
    """The measure, its value before compression, and the peak memory in MB of a process that judges so many samples."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(JUDGING), folder, str(number)],
        capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    measure, before, peak_mb = done.stdout.split()
    return measure, float(before), int(peak_mb)


@pytest.mark.soak
def test_memory_does_not_grow_with_the_test_set(tmp_path):
    few, many = (judged(tmp_path, number) for number in (1280, 5376))  # of each, 256 calibrate
    assert few[:2] == many[:2] == ("loss", 0.01)  # 0.1 squared, by construction
    assert many[2] - few[2] < 128  # a quarter of the further 512 MB


class Sequences(torch.utils.data.Dataset):
    """Sequences of up to 40 numbers, which a batch pads to its own longest one; the target is their last sign."""

    def __len__(self):
        return 400

    def __getitem__(self, n):
        rng = np.random.default_rng(n)
        values = rng.normal(size=(1 + n // 10, 3)).astype(np.float32)
        return values, np.sign(values)


def padded(items):
    longest = max(len(values) for values, _ in items)
    return tuple(
        torch.stack([nn.functional.pad(torch.from_numpy(item[n]), (0, 0, 0, longest - len(item[n]))) for item in items])
        for n in range(2)
    )


def squared(outputs, targets):
    return ((outputs - targets) ** 2).mean()


SEQUENCES = Task(
    name="sequences", model=lambda: nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 3)), loss=squared,
    train_data=Sequences, test_data=Sequences, collate=padded, dynamic={"input": [1]},
    metrics={"agreement": lambda outputs, targets: (outputs * targets > 0).float().mean()},
    higher_is_better={"agreement": True},
)  # fmt: skip


def exported(task: Task, folder):
    export_task(task, initial_parameters(task), folder / "model.onnx")
    return folder / "model.onnx"


def test_a_batch_is_padded_as_in_an_evaluation_and_judged_by_its_metric(tmp_path):
    made = compress_under_gate(SEQUENCES, exported(SEQUENCES, tmp_path), 1.0, None)
    assert made.report["measure"] == "agreement"
    model, total, count = make_model(SEQUENCES, initial_parameters(SEQUENCES)).eval(), 0.0, 0
    for chunk in split(held_out(SEQUENCES, {}))[1].chunks(128):
        with torch.no_grad():
            total += float(squared(model(chunk.inputs), chunk.targets)) * len(chunk)
        count += len(chunk)
    assert made.metrics["before/loss"] == pytest.approx(total / count, rel=1e-4)
    assert count == 400 - 80


def test_outputs_of_different_sizes_have_no_mean_to_compare_a_loss_with(tmp_path):
    path = exported(SEQUENCES, tmp_path)
    with pytest.raises(NotMeasurable, match=r"its outputs have other sizes in each batch.*--max-drop 1%"):
        gate_of(SEQUENCES, path, "loss")
    assert gate_of(SEQUENCES, path, "loss", relative=True).measure.name == "loss"


def test_each_item_is_read_once_for_each_file(tmp_path):
    reads = []

    class Counted(Sequences):
        def __getitem__(self, n):
            reads.append(n)
            return super().__getitem__(n)

    task = replace(SEQUENCES, test_data=Counted)
    path = exported(task, tmp_path)
    reads.clear()
    compress_under_gate(task, path, 1.0, None)
    assert len(reads) == 80 + 2 + 2 * 320  # calibration, the form of the outputs, both files
