"""Global random states: seeded for user code, given back to whoever called."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from edgefl.config import TrainConfig
from edgefl.task import FitResult, Task, load_task
from edgefl.training.evaluation import evaluate
from edgefl.training.local import initial_parameters, train_locally
from edgefl.training.metrics import WholeSet
from edgefl.training.randomness import Drawn, kept, seeded


def draw():
    return random.random(), float(np.random.normal()), float(torch.rand(()))


def set_all(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def test_a_seed_gives_the_same_numbers_of_all_three():
    with seeded(1):
        first = draw()
    with kept():
        with seeded(2):
            other = draw()
        with seeded(1):
            assert draw() == first
    assert not set(first) & set(other)


def fail_inside(context):
    with context():
        with seeded(1):
            draw()
        draw()
        raise ZeroDivisionError


@pytest.mark.parametrize("context", [kept, lambda: seeded(3)], ids=["kept", "seeded"])
def test_who_is_outermost_gives_the_states_back(context):
    set_all(5)
    wanted = draw()
    set_all(5)
    with pytest.raises(ZeroDivisionError):
        fail_inside(context)
    assert draw() == wanted


@pytest.mark.parametrize("drawing", [random.random, np.random.normal, lambda: np.random.seed(4)])
def test_a_draw_is_seen_and_put_back(drawing):
    before = Drawn()
    assert not before.since()
    wanted = random.random(), np.random.normal()
    assert before.since()
    before.put_back()
    drawing()
    assert before.since()
    before.put_back()
    assert not before.since()
    assert (random.random(), np.random.normal()) == wanted


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)
        with torch.no_grad():
            self.layer.bias.copy_(torch.tensor([random.random(), np.random.normal()]))

    def forward(self, inputs):
        return self.layer(inputs) + float(np.random.normal()) + random.random()


def loss(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets) * (1 + random.random() + np.random.uniform())


def load(**_options):
    kept = np.random.permutation(12)[:8]
    return np.arange(48, dtype=np.float32).reshape(12, 4)[kept] / 48 + random.random(), kept % 2


def fit(parameters, config, options):
    return FitResult(tree={"w": np.array(draw())}, weight=1.0, metrics={"drawn": random.random()})


TASK = Task(
    name="draws",
    model=Net,
    loss=loss,
    train_data=load,
    test_data=load,
    metrics={"m": WholeSet(lambda *_: np.random.normal())},
)
OWN = Task(name="own", initial=lambda: {"w": np.array(draw())}, fit=fit)


@pytest.mark.parametrize("task", [TASK, OWN], ids=["torch", "fit"])
def test_what_a_device_does_depends_on_seed_round_and_client_alone(task):
    def once(seed=0, round=1, client="a"):
        draw()  # the caller's own
        start = initial_parameters(task, seed)
        done = train_locally(task, start, TrainConfig(seed=seed), options={}, round=round, client=client)
        values = [*start.values(), *done.tree.values(), done.metrics["train_loss" if task is TASK else "train_drawn"]]
        return np.concatenate([np.ravel(one) for one in values])

    np.testing.assert_array_equal(once(), once())
    assert not np.array_equal(once(), once(seed=1))
    assert not np.array_equal(once(), once(round=2))
    assert not np.array_equal(once(), once(client="b"))
    before = Drawn()
    once()
    draw()
    before.put_back()


def test_evaluation_says_the_same_each_time_and_moves_nothing():
    start = initial_parameters(TASK)
    before = Drawn()
    first = evaluate(TASK, start)
    assert not before.since()
    random.random()
    assert evaluate(TASK, start) == first


def test_what_a_module_draws_when_it_is_imported_is_the_same_in_every_process(tmp_path):
    (tmp_path / "pyproject.toml").write_text('[tool.edgefl]\ntask = "drawing_module:task"\n')
    code = "import random, numpy as np\nfrom edgefl import Task\ndrawn = random.random(), np.random.normal()\n"
    (tmp_path / "drawing_module.py").write_text(
        code + "task = Task(name=str(drawn), initial=lambda: {}, fit=lambda *_: None)\n"
    )
    before = Drawn()
    name = load_task(str(tmp_path)).name
    assert not before.since()
    with seeded(0):
        assert name == str((random.random(), np.random.normal()))
