"""Adapters in a model: what a job has of them, what a client trains and sends, and which kinds are refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from edgefl import Task
from edgefl.config import TrainConfig
from edgefl.errors import TaskError
from edgefl.training.adapters import adapters_of, restart, with_factors, without_adapters
from edgefl.training.evaluation import evaluate
from edgefl.training.local import adapter_seed, initial_parameters, make_model, train_locally
from edgefl.training.parts import parts_of
from edgefl.trees import BlockTree, EncodedTree, Tree, encoded, factors_of, spec_of
from tests.e2e.tasks.lora import lora_task

TRAIN = TrainConfig(steps=5, lr=0.5, batch_size=8)
UP, DOWN = "base_model.model.up@lora", "base_model.model.down@lora"


def trained(task: Task, parameters: Tree, frozen: Tree, *, rank: str = "2", number: int = 1, client: str = "a") -> Tree:
    return train_locally(
        task, parameters, TRAIN, options={"lora_rank": rank}, round=number, client=client, frozen=frozen
    ).tree


def with_matrices(parameters: Tree, rng: np.random.Generator) -> EncodedTree:
    """Return parameters in which both matrices have some rank 3."""
    stored = {name: np.array(one) for name, one in encoded(parameters).items() if "@" not in name}
    for name in (UP, DOWN):
        rows, columns = spec_of(parameters)[name].shape
        stored[f"{name}_B"] = rng.normal(size=(rows, 3)).astype(np.float32)
        stored[f"{name}_A"] = rng.normal(size=(3, columns)).astype(np.float32)
    return EncodedTree(stored)


def test_a_job_has_matrices_and_the_base_is_frozen() -> None:
    parts = parts_of(lora_task.task)
    assert {name: str(one) for name, one in spec_of(parts.moving).items()} == {
        UP: "float32[24, 8]",
        DOWN: "float32[24, 24]",
        "base_model.model.head.modules_to_save.default.weight": "float32[3, 24]",
        "base_model.model.head.modules_to_save.default.bias": "float32[3]",
    }
    assert "base_model.model.up.base_layer.weight" in parts.frozen
    assert not [name for name in {**parts.moving, **parts.frozen} if "lora_A" in name or "lora_B" in name]
    assert encoded(parts.moving)[f"{DOWN}_A"].shape == (0, 24)
    assert not parts.moving[DOWN].any()
    again = parts.split(initial_parameters(lora_task.task))
    assert isinstance(again.moving, BlockTree)
    assert set(again.moving.factored) == {UP, DOWN}


def test_a_client_sends_the_factors_of_what_it_trained() -> None:
    parts = parts_of(lora_task.task)
    update = trained(lora_task.task, parts.moving, parts.frozen)
    assert spec_of(update) == spec_of(parts.moving)
    pair = factors_of(update, DOWN)
    assert pair is not None
    assert pair.rank == 2
    assert np.abs(update[DOWN]).max() > 1e-3
    # The model with what was trained is the base with the matrix in its weights.
    model = make_model(lora_task.task, {**parts.frozen, **parts.moving})
    restart(model, adapters_of("lora", model), 0)
    inputs = lora_task.held_out()[0]
    base = lora_task.Base()
    state = {name: torch.from_numpy(np.array(one)) for name, one in parts.frozen.items() if "original" not in name}
    moved = {
        "up.weight": state["base_model.model.up.base_layer.weight"] + torch.from_numpy(update[UP]),
        "up.bias": state["base_model.model.up.base_layer.bias"],
        "down.weight": state["base_model.model.down.base_layer.weight"] + torch.from_numpy(update[DOWN]),
    }
    head = "base_model.model.head.modules_to_save.default."
    moved |= {f"head.{one}": torch.from_numpy(parts.moving[head + one] + update[head + one])
              for one in ("weight", "bias")}  # fmt: skip
    base.load_state_dict(moved)
    after = {name: parts.moving[name] + update[name] for name in parts.moving}
    merged = make_model(lora_task.task, {**parts.frozen, **after}).eval()
    assert torch.allclose(base(inputs), merged(inputs), atol=1e-5)
    assert torch.allclose(base(inputs), without_adapters(merged, adapters_of("lora", merged))(inputs), atol=1e-5)


@pytest.mark.parametrize("rank", ["1", "3", "8"])
def test_the_first_step_is_that_of_the_adapter_at_any_rank(rank: str) -> None:
    """After one step from B = 0, the change of B is -lr s G A^T, where G is the gradient of the weight."""
    parts = parts_of(lora_task.task)
    config = TrainConfig(steps=1, lr=0.5, batch_size=64)
    update = train_locally(
        lora_task.task, parts.moving, config, options={"lora_rank": rank}, round=3, client="a", frozen=parts.frozen
    ).tree
    torch.manual_seed(7)
    base = lora_task.Base()
    inputs, targets = lora_task.train_data()
    nn.functional.cross_entropy(base(inputs), targets).backward()  # type: ignore[no-untyped-call]
    gradient = base.down.weight.grad
    assert gradient is not None
    scaling = 2 / int(rank) ** 0.5
    model = lora_task.model(int(rank))
    adapters = adapters_of("lora", model)
    restart(model, adapters, adapter_seed(config.seed, 3))
    right = next(one for one in adapters if one.matrix == DOWN).right.detach()
    wanted = -0.5 * scaling**2 * (gradient @ right.T) @ right
    assert np.allclose(update[DOWN], wanted.numpy(), atol=1e-6)


def test_ranks_follow_the_option_and_the_smaller_form_is_sent() -> None:
    parts = parts_of(lora_task.task)
    ranks = []
    for rank in ("1", "5", "6", "16"):
        pair = factors_of(trained(lora_task.task, parts.moving, parts.frozen, rank=rank), UP)
        ranks.append(None if pair is None else pair.rank)
    assert ranks == [1, 5, None, None]  # 24 x 8 = 192 = 6 * (24 + 8)


def test_a_round_begins_with_the_matrix_and_new_adapters() -> None:
    parts = parts_of(lora_task.task)
    moved = with_matrices(parts.moving, np.random.default_rng(0))
    one, again, next_round, other = (
        trained(lora_task.task, moved, parts.frozen, number=number, client=client)
        for number, client in ((1, "a"), (1, "a"), (2, "a"), (1, "b"))
    )
    assert np.array_equal(one[DOWN], again[DOWN])
    first, second, third = (factors_of(tree, DOWN) for tree in (one, next_round, other))
    assert first is not None
    assert second is not None
    assert third is not None
    assert np.abs(first.right - second.right).max() > 0.05  # another A in another round
    assert np.abs(first.right - third.right).max() < 0.05  # the same A for all clients; they trained it a little
    assert not np.allclose(one[DOWN], trained(lora_task.task, parts.moving, parts.frozen)[DOWN])


def test_evaluation_is_of_the_base_with_the_matrix() -> None:
    parts = parts_of(lora_task.task)
    moved = with_matrices(parts.moving, np.random.default_rng(1))
    whole = {**parts.frozen, **{name: moved[name] for name in moved}}
    base = "base_model.model.down.base_layer.weight"
    put = {**whole, base: whole[base] + moved[DOWN], DOWN: np.zeros_like(moved[DOWN])}
    assert evaluate(lora_task.task, whole)["loss"] == pytest.approx(evaluate(lora_task.task, put)["loss"], abs=1e-6)
    assert evaluate(lora_task.task, whole)["loss"] != pytest.approx(
        evaluate(lora_task.task, {**parts.frozen, **parts.moving})["loss"], abs=1e-3
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-3), (torch.float64, 1e-9)])
def test_other_dtypes(dtype: torch.dtype, tolerance: float) -> None:
    def model(rank: int = 2) -> nn.Module:
        torch.manual_seed(7)
        return lora_task.with_adapters(lora_task.Base(), rank).to(dtype)

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs.float(), targets)

    def data(part: str = "0") -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = lora_task.train_data(part)
        return inputs.to(dtype), targets

    task = Task(name="lora", model=model, loss=loss, train_data=data)
    parts = parts_of(task)
    update = trained(task, parts.moving, parts.frozen)
    wide = "float64" if dtype is torch.float64 else "float32"
    assert spec_of(update)[DOWN].dtype.name == spec_of(parts.moving)[DOWN].dtype.name == wide
    pair = factors_of(update, DOWN)
    assert pair is not None
    assert pair.right.dtype.itemsize == dtype.itemsize  # in 16 bits it is sent in 16 bits
    trained_model = make_model(task, {**parts.frozen, **{name: parts.moving[name] for name in parts.moving}})
    weight = next(one for one in adapters_of("lora", trained_model) if one.matrix == DOWN)
    assert weight.moved(np.zeros((24, 24), np.float64), update[DOWN]) == pytest.approx(update[DOWN], abs=tolerance)


def test_a_layer_that_stores_its_weight_turned() -> None:
    """Conv1D of GPT-2 has (inputs, outputs): the matrix is (outputs, inputs), and is added turned."""
    torch.manual_seed(0)
    layer = nn.Sequential(Conv1D(6, 4))
    before = layer[0].weight.detach().clone()
    config = LoraConfig(r=2, target_modules=["0"], fan_in_fan_out=True, init_lora_weights=False)
    model = get_peft_model(layer, config)  # type: ignore[arg-type]
    (adapter,) = adapters_of("lora", model)
    assert adapter.spec.shape == (6, 4)
    update = with_factors((adapter,), {})
    moved = adapter.moved(before.numpy(), update[adapter.matrix])
    inputs = torch.randn(3, 4)
    by_hand = inputs @ torch.from_numpy(moved) + layer[0].base_layer.bias
    assert torch.allclose(model(inputs), by_hand, atol=1e-6)
    assert np.abs(moved - before.numpy()).max() > 1e-2


def changed(**changes: object) -> Callable[[], nn.Module]:
    return lambda: lora_task.with_adapters(lora_task.Base(), **changes)


class Tied(lora_task.Base):
    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(lora_task.WIDTH, lora_task.WIDTH, bias=False)
        self.again.weight = self.down.weight

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs) + self.again(torch.zeros(lora_task.WIDTH)).sum()


class WithTable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)


def with_trained_weight() -> nn.Module:
    model = lora_task.model()
    model.base_model.model.down.base_layer.weight.requires_grad_(True)  # type: ignore[operator, union-attr]
    return model


def quantised() -> nn.Module:
    model = lora_task.model()
    layer = model.base_model.model.down.base_layer  # type: ignore[union-attr]
    layer.weight = nn.Parameter(torch.zeros(24, 24, dtype=torch.uint8), requires_grad=False)  # type: ignore[union-attr]
    return model


def merged() -> nn.Module:
    model = lora_task.model()
    model.merge_adapter()  # type: ignore[operator]
    return model


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (changed(use_dora=True), r"layer 'base_model.model.up' is DoRA.*Leave use_dora out"),
        (changed(lora_bias=True, target_modules=["up"]), "has a bias of its own"),
        (lambda: lora_task.with_adapters(Tied()), "layer 'base_model.model.down' is on a weight that another layer sh"),
        (lambda: get_peft_model(WithTable(), LoraConfig(target_modules=["table"])), "is on a Embedding"),  # type: ignore[arg-type]
        (with_trained_weight, "is on a weight that is trained, too"),
        (quantised, "is on a quantised weight"),
        (merged, "is merged into its base"),
    ],
)
def test_what_is_no_sum_of_products_is_refused_with_the_layer(make: Callable[[], nn.Module], fault: str) -> None:
    with pytest.raises(TaskError, match=fault):
        adapters_of("lora", make())


def test_rslora_dropout_and_other_ranks_within_a_model_are_exact() -> None:
    model = lora_task.with_adapters(lora_task.Base(), 2, rank_pattern={"down": 3}, lora_dropout=0.5)
    assert [one.left.shape[1] for one in adapters_of("lora", model)] == [2, 3]
    assert [one.scaling for one in adapters_of("lora", model)] == pytest.approx([2 / 2**0.5, 2 / 3**0.5])


def test_a_frozen_a_leaves_b_an_ordinary_parameter() -> None:
    def model() -> nn.Module:
        made = lora_task.model()
        for name, one in made.named_parameters():
            one.requires_grad_("lora_A" not in name and one.requires_grad)
        return made

    task = dataclasses.replace(lora_task.task, model=model)
    parts = parts_of(task)
    assert "base_model.model.down.lora_B.default.weight" in parts.moving
    assert "base_model.model.down.lora_A.default.weight" in parts.frozen
    update = train_locally(task, parts.moving, TRAIN, options={}, round=1, client="a", frozen=parts.frozen).tree
    assert np.abs(update["base_model.model.down.lora_B.default.weight"]).max() > 1e-3


def test_adapters_that_disappear_are_reported() -> None:
    parts = parts_of(lora_task.task)
    gone = dataclasses.replace(lora_task.task, model=lora_task.Base)
    with pytest.raises(
        TaskError,
        match=r"not the parameters of its model: tensors missing: down\.weight",
    ):
        train_locally(gone, parts.moving, TRAIN, options={}, round=1, client="a", frozen=parts.frozen)


def test_settings_of_a_job_that_was_continued_are_refused_on_the_device() -> None:
    parts = parts_of(lora_task.task)
    config = dataclasses.replace(TRAIN, steps=0, epochs=1, algorithm="fedsgd")
    with pytest.raises(TaskError, match=r"trains LoRA adapters, and train.algorithm=fedsgd sends one gradient"):
        train_locally(lora_task.task, parts.moving, config, options={}, round=1, client="a", frozen=parts.frozen)


@pytest.mark.parametrize("rank", ["0", "-1", "4.5", "many", "5000"])
def test_a_wrong_rank_is_refused(rank: str) -> None:
    parts = parts_of(lora_task.task)
    with pytest.raises(TaskError, match=f"lora_rank='{rank}' is no rank"):
        trained(lora_task.task, parts.moving, parts.frozen, rank=rank)


def test_a_model_without_a_rank_cannot_have_another() -> None:
    parts = parts_of(lora_task.task)
    fixed = dataclasses.replace(lora_task.task, model=lambda: lora_task.with_adapters(lora_task.Base()))
    with pytest.raises(TaskError, match="adapters of rank 4 are asked for, and its model takes no rank"):
        trained(fixed, parts.moving, parts.frozen, rank="4")
