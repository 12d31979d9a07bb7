"""A device's training with the cloud's session, without a network: exact, in each shape, over lost connections."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from edge_agent.training.split.loop import micro_batches_of
from edgefl import Task
from edgefl.errors import TaskError
from edgefl.protocols.split.messages import BeginTraining, Forward, Keep
from edgefl.training.local import derive_seed, make_model, train_epochs
from edgefl.training.samples import train_samples
from edgefl.training.steps.descent import Autograd, Descent
from tests.cloud.split.bench import Bench, settings
from tests.edgefl.offload.training.models import adamw, decoder, momentum, picture_task, token_task

KINDS = {
    "plain": (picture_task(optimizer=momentum), {}),
    "micro-batches": (picture_task(optimizer=momentum), {"micro_batches": 3}),
    "u": (picture_task(optimizer=adamw), {"cut": "relu", "last_cut": "norm", "micro_batches": 2}),
    "decoder-u": (token_task(optimizer=adamw), {"cut": "1", "last_cut": "2", "micro_batches": 2}),
}


def unsplit(task: Task, config: Any, device: str = "device-1") -> dict[str, torch.Tensor]:
    model = make_model(task, seed=config.seed).train()
    descent = Descent(task, Autograd(task, model))
    train_epochs(task, model, train_samples(task, {}), config, derive_seed(config.seed, config.round, device), descent)
    return dict(model.state_dict())


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    for name, here in one.items():
        assert (here - other[name]).detach().abs().max() <= tolerance, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_in_parts_is_the_round_of_the_whole_model(kind: str, tmp_path: Any) -> None:
    task, split = KINDS[kind]
    config = settings(split, lr=0.002 if task.optimizer is adamw else 0.05)
    bench = Bench(task, config, tmp_path)
    loop = bench.device()
    loss = loop.train()
    assert_equal(bench.both(loop), unsplit(task, config), 1e-5)
    assert 0 < loss < 10
    assert loop.bytes_up > 0 < loop.bytes_down


@pytest.mark.parametrize("kind", ["micro-batches", "u"])
def test_lost_connections_in_mid_batch_change_nothing(kind: str, tmp_path: Any) -> None:
    """Cut while a batch goes up, before its last answer is read, and at a checkpoint: the same bits come out."""
    task, split = KINDS[kind]
    config = settings(split)
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
    bench, other = Bench(task, config, tmp_path / "one"), Bench(task, config, tmp_path / "other")
    loop, disturbed = bench.device(), other.device(cuts=(0, 1, 3, 4, 5, 7, 9, 11))
    loop.train()
    disturbed.train()
    assert_equal(bench.both(loop), other.both(disturbed))
    assert sum(isinstance(one, BeginTraining) for one in other.sent) == 9
    steps = [one.step for one in other.sent if isinstance(one, Forward)]
    assert max(steps.count(step) for step in set(steps)) < 3 * 9  # it did not begin anew each time


def test_a_killed_training_process_continues_from_the_checkpoint_that_both_have(tmp_path: Any) -> None:
    task, split = KINDS["u"]
    config = settings(split)
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
    bench, other = Bench(task, config, tmp_path / "one"), Bench(task, config, tmp_path / "other")
    loop = bench.device()
    loop.train()

    def killed() -> None:
        other.restart_cloud()

    disturbed = other.device(cuts=(19, killed, 23, killed))
    disturbed.train()
    assert_equal(bench.both(loop), other.both(disturbed))
    assert any(isinstance(one, Keep) for one in other.sent)
    begun = [one for one in other.sent if isinstance(one, BeginTraining)]
    assert {0, 3} <= set(begun[1].kept)


def test_a_killed_device_continues_from_its_checkpoint(tmp_path: Any) -> None:
    task, split = KINDS["plain"]
    config = settings(split)
    for folder in ("one", "other"):
        (tmp_path / folder).mkdir()
    bench, other = Bench(task, config, tmp_path / "one"), Bench(task, config, tmp_path / "other")
    loop = bench.device()
    loop.train()

    class Killed(BaseException):
        pass

    def kill() -> None:
        raise Killed

    with pytest.raises(Killed):
        other.device(cuts=(7, kill)).train()
    again = other.device()  # another process: it has what is on disk
    assert again.run.checkpoints.steps() == [3]
    again.train()
    assert_equal(bench.both(loop), other.both(again))
    assert len([one for one in other.sent if isinstance(one, Forward) and one.step < 3]) == 3


def test_who_is_lost_for_too_long_fails_with_the_reason(tmp_path: Any) -> None:
    task, split = KINDS["plain"]
    bench = Bench(task, settings(split), tmp_path)
    loop, now = bench.device(cuts=[0] * 1000), [0.0]

    def tick() -> float:
        now[0] += 10
        return now[0]

    object.__setattr__(loop.run, "clock", tick)
    with pytest.raises(TaskError, match=r"cut by the test; given up after 120 s without a step"):
        loop.train()


def test_one_way_training_waits_for_no_gradient(tmp_path: Any) -> None:
    config = settings({"gradients": "auxiliary", "micro_batches": 2}, epochs=3)
    bench = Bench(picture_task(), config, tmp_path)
    loop = bench.device()
    before = {name: one.detach().clone() for name, one in loop.run.half.state.tensors.items()}
    loop.train()
    assert loop.bytes_down < loop.bytes_up / 10
    assert all((one - before[name]).abs().max() > 1e-4 for name, one in loop.run.half.state.tensors.items())
    assert loop.run.auxiliary is not None
    assert set(loop.run.auxiliary.state()) == {"auxiliary/weight", "auxiliary/bias"}
    found = bench.files.result(1, "device-1")
    assert found is not None
    assert any(abs(one - bench.tensors[name]).max() > 1e-4 for name, one in found[0].items())


def test_micro_batches_are_of_equal_size_but_for_the_last_and_count_by_their_samples() -> None:
    found = list(micro_batches_of(5, 8, 3))
    assert [(one.step, one.number, at) for one, at in found] == [
        (5, 0, slice(0, 3)),
        (5, 1, slice(3, 6)),
        (5, 2, slice(6, 8)),
    ]
    assert [one.share for one, _ in found] == [3 / 8, 3 / 8, 2 / 8]


def test_a_shared_part_is_trained_by_all(tmp_path: Any) -> None:
    bench = Bench(picture_task(), settings({"cloud_part": "shared"}), tmp_path)
    one, other = bench.device("device-1"), bench.device("device-2", cuts=(5,))
    one.train()
    after_one = {name: array.copy() for name, array in (bench.files.result(1, "device-1") or ({}, 0))[0].items()}
    other.train()
    found = bench.files.result(1, "device-2")
    assert found is not None
    assert any(abs(array - after_one[name]).max() > 1e-4 for name, array in found[0].items())
    bench.restart_cloud()
    spec = bench.spec(one, "device-3")
    kept = bench.cloud.state(spec).moving()
    assert all((kept[name] == array).all() for name, array in found[0].items())


def test_token_tasks_keep_a_tied_weight_as_one_tensor(tmp_path: Any) -> None:
    bench = Bench(token_task(decoder), settings({"cut": "1", "last_cut": "2"}), tmp_path)
    loop = bench.device()
    assert "lm_head.weight" not in loop.run.half.state.tensors  # it is model.embed_tokens.weight
    loop.train()
