"""The benchmark's CNN is a task of edgefl, and torchrun's own."""

from __future__ import annotations

import torch

from benchmarks.sites_cnn import SAMPLES, Cnn, task
from edgefl.training.samples import train_samples


def test_the_cnn_takes_the_tasks_pictures():
    samples = train_samples(task, {})
    assert len(samples) == SAMPLES
    assert Cnn()(samples.inputs[:3]).shape == (3, 10)
    assert torch.isfinite(task.loss(Cnn()(samples.inputs[:3]), samples.targets[:3]))
