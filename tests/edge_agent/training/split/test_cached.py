"""A frozen device part: activations go up once, and the training is that of the whole model with frozen layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cloud.split.cache import QuotaExceeded
from edgefl.errors import TaskError
from edgefl.protocols.split.messages import ActivationRows, Forward, Lacks, SampleStep
from edgefl.training.local import derive_seed, make_model, train_epochs
from edgefl.training.samples import train_samples
from edgefl.training.steps.descent import Autograd, Descent
from tests.cloud.split.bench import Bench, settings
from tests.edgefl.offload.training.models import SmallConvNet, momentum, picture_task

FROZEN = {"device_part": "frozen", "cut": "second"}


def frozen_net() -> SmallConvNet:
    net = SmallConvNet()
    net.first.requires_grad_(False)
    net.second.requires_grad_(False)
    return net


def test_epochs_on_kept_activations_are_epochs_of_the_whole_model(tmp_path: Any) -> None:
    task, config = picture_task(optimizer=momentum), settings(FROZEN, epochs=3)
    bench = Bench(task, config, tmp_path)
    loop = bench.device()
    loop.train()
    whole = picture_task(frozen_net, optimizer=momentum)
    model = make_model(whole, seed=config.seed).train()
    descent = Descent(whole, Autograd(whole, model))
    train_epochs(whole, model, train_samples(whole, {}), config, derive_seed(0, 1, "device-1"), descent)
    found = bench.both(loop)
    for name, one in model.named_parameters():
        assert (found[name] - one).detach().abs().max() <= 1e-5, name
    assert not any(isinstance(one, Forward) for one in bench.sent)


def test_bytes_over_the_cut_are_a_twentieth(tmp_path: Any) -> None:
    """Five epochs: fp32 both ways in each, against int8 sent once."""
    for folder in ("every", "once"):
        (tmp_path / folder).mkdir()
    every = Bench(picture_task(), settings({"cut": "second"}, epochs=5), tmp_path / "every").device()
    once = Bench(picture_task(), settings(FROZEN | {"wire": "int8"}, epochs=5), tmp_path / "once").device()
    every.train()
    once.train()
    assert every.bytes_up + every.bytes_down > 5 * (
        once.bytes_up + once.bytes_down
    )  # 128 values a sample: headers count


def test_the_next_round_and_a_killed_process_send_nothing_again(tmp_path: Any) -> None:
    bench = Bench(picture_task(), settings(FROZEN), tmp_path)
    bench.device().train()
    assert sum(isinstance(one, ActivationRows) for one in bench.sent) == 8  # 64 samples, 8 in a message
    bench.sent.clear()
    bench.restart_cloud()
    bench.device().train()
    assert not any(isinstance(one, ActivationRows) for one in bench.sent)
    assert any(isinstance(one, SampleStep) for one in bench.sent)


def test_kills_change_nothing(tmp_path: Any) -> None:
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
    bench, other = (
        Bench(picture_task(optimizer=momentum), settings(FROZEN), tmp_path / "one"),
        Bench(picture_task(optimizer=momentum), settings(FROZEN), tmp_path / "other"),
    )
    loop = bench.device()
    loop.train()

    def kill() -> None:
        other.restart_cloud()

    disturbed = other.device(cuts=(3, kill, 12, kill, 6, 2, 5))
    disturbed.train()
    one, two = bench.both(loop), other.both(disturbed)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_another_device_s_rows_are_not_there(tmp_path: Any) -> None:
    bench = Bench(picture_task(), settings(FROZEN), tmp_path)
    bench.device("device-1").train()
    bench.sent.clear()
    bench.device("device-2").train()  # the same samples, from another device
    assert sum(isinstance(one, ActivationRows) for one in bench.sent) == 8
    assert not any(isinstance(one, Lacks) for one in bench.sent)


def test_a_full_cache_is_an_error_with_the_remedy(tmp_path: Any) -> None:
    bench = Bench(picture_task(), settings(FROZEN), tmp_path, cache_bytes=20_000)
    with pytest.raises(
        QuotaExceeded, match=r"device device-1 would have \d+ bytes .* allowed: 20000.*--device-cache-mb"
    ):
        bench.device().train()


def test_what_is_of_the_batch_cannot_be_kept_by_sample(tmp_path: Any) -> None:
    class Meaned(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = torch.nn.Linear(64, 16), torch.nn.Linear(16, 10)

        def forward(self, pictures: torch.Tensor) -> torch.Tensor:
            hidden = self.first(torch.flatten(pictures, 1))
            mean = hidden.mean(0)
            return self.head(hidden - mean)

    bench = Bench(picture_task(Meaned), settings({"device_part": "frozen", "cut": "mean"}), tmp_path)
    with pytest.raises(TaskError, match="mean crosses the cut and is of the batch, not of its samples"):
        bench.device().train()
