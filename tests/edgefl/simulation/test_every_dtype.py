"""What the wire carries trains in every engine as on a device: a table of models, engines beside `train_locally`."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from edgefl.aggregation.mean import WeightedMean
from edgefl.config import JobConfig, from_dict
from edgefl.records import Partial, Plan, Update
from edgefl.simulation.engines.fleets import SimulationSetup, TrainingMethod
from edgefl.simulation.engines.loop import LoopFleet
from edgefl.simulation.engines.pool.chunks import ChunkTrainer
from edgefl.simulation.engines.pool.messages import Chunk, Flush
from edgefl.simulation.engines.stackable import why_not_stacked
from edgefl.simulation.engines.stacked_fleet import StackedFleet
from edgefl.simulation.world.task_population import TaskPopulation
from edgefl.task import Task
from edgefl.training.local import initial_parameters, train_locally
from edgefl.training.parts import parts_of
from edgefl.trees import is_float

CLIENTS = 5


class Net(nn.Module):
    """A dense layer, and what a case adds to it."""

    def __init__(self, add=None, use=None, dtype=torch.float32):
        super().__init__()
        self.layer, self.use = nn.Linear(4, 3, dtype=dtype), use
        if add is not None:
            add(self)

    def forward(self, inputs):
        if inputs.dtype == torch.int64:
            inputs = self.table(inputs).flatten(1)
        outputs = self.layer(inputs)
        return outputs if self.use is None else self.use(self, outputs)


def buffer(value):
    return lambda net: net.register_buffer("kept", value)


def parameter(value):
    return lambda net: net.register_parameter("kept", nn.Parameter(value))


def masked(net, outputs):
    return outputs.masked_fill(~net.kept, -5.0)


def counted(net, outputs):
    if net.training:
        net.kept.add_(1)
    return outputs


def flipped(net, outputs):
    if net.training:
        net.kept.copy_(~net.kept)
    return outputs


def scaled(net, outputs):
    return outputs * net.kept


def tie(net):
    net.layer = nn.Linear(4, 4)
    net.other = nn.Linear(4, 4)
    net.other.weight = net.layer.weight


def table(net):
    net.table = nn.Embedding(7, 2)


FROZEN_INTS = nn.Parameter(torch.arange(6, dtype=torch.int8).view(2, 3), requires_grad=False)
MODELS = {
    "boolean mask": Net(buffer(torch.tensor([True, False, True])), masked),
    "boolean that flips": Net(buffer(torch.tensor([True, False, True])), flipped),
    "0-d boolean": Net(buffer(torch.tensor(True))),
    "0-d counter": Net(buffer(torch.tensor(2**60 + 1)), counted),
    "uint8 that wraps": Net(buffer(torch.tensor([254, 3], dtype=torch.uint8)), counted),
    "int8": Net(buffer(torch.tensor([-128, 127], dtype=torch.int8))),
    "int16": Net(buffer(torch.tensor([-5], dtype=torch.int16)), counted),
    "int32": Net(buffer(torch.tensor([[7]], dtype=torch.int32)), counted),
    "uint16": Net(buffer(torch.tensor([65535], dtype=torch.uint16))),
    "uint32": Net(buffer(torch.tensor([2**32 - 1], dtype=torch.uint32))),
    "uint64": Net(buffer(torch.tensor([2**63 - 1], dtype=torch.uint64))),
    "float16 buffer": Net(buffer(torch.tensor([0.5, 2.0], dtype=torch.float16))),
    "float64 buffer": Net(buffer(torch.tensor([0.1], dtype=torch.float64)), counted),
    "empty buffer": Net(buffer(torch.empty(0))),
    "empty integers": Net(buffer(torch.empty(3, 0, dtype=torch.int64)), counted),
    "frozen integers": Net(lambda net: net.register_parameter("kept", FROZEN_INTS)),
    "0-d parameter": Net(parameter(torch.tensor(1.5)), scaled),
    "0-d float64 parameter": Net(parameter(torch.tensor(1.5, dtype=torch.float64)), scaled),
    "empty parameter": Net(parameter(torch.empty(0))),
    "empty matrix": Net(parameter(torch.empty(0, 3)), lambda net, outputs: outputs + net.kept.sum()),
    "transposed": Net(parameter(torch.arange(12.0).view(3, 4).t()), lambda net, outputs: outputs @ net.kept.t()[:, :3]),
    "tied": Net(tie, lambda net, outputs: net.other(outputs)),
    "float64": Net(dtype=torch.float64),
    "float16": Net(dtype=torch.float16),
    "bfloat16": Net(dtype=torch.bfloat16),
    "bfloat16 buffer": Net(buffer(torch.tensor([0.5, -3.0], dtype=torch.bfloat16)), counted),
    "0-d bfloat16 parameter": Net(parameter(torch.tensor(1.5, dtype=torch.bfloat16)), scaled),
    "embedding": Net(table),
}
ENGINES = ("loop", "stacked", "worker", "worker with stacks")


def load(kind, part="0", parts="1"):
    rng = np.random.default_rng(int(part))
    count = 3 + 2 * int(part)
    if kind == "embedding":
        return rng.integers(0, 7, (count, 2)), rng.integers(0, 3, count)
    dtype = {"float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}.get(kind, torch.float32)
    inputs = torch.from_numpy(rng.normal(size=(count, 4))).to(dtype)
    return inputs, torch.from_numpy(rng.integers(0, 3, count))


def setup_of(kind):
    """Make a setup whose model is a copy of the table's, so that no engine sees what another did to it."""
    import copy

    task = Task(
        name="dtypes", model=lambda: copy.deepcopy(MODELS[kind]), loss=nn.functional.cross_entropy,
        train_data=lambda part="0", parts="1": load(kind, part, parts),
    )  # fmt: skip
    population = TaskPopulation(task, CLIENTS, {})
    config = from_dict(JobConfig, {"train": {"batch_size": 4, "epochs": 2, "lr": 0.1}})
    return SimulationSetup(
        task=task, reference=None, make_population=lambda _task: population, population=population, config=config
    )


def answers_of(engine, setup, plan):
    if engine == "loop":
        return list(LoopFleet(setup).collect(plan))
    if engine == "stacked":
        return list(StackedFleet(setup).collect(plan))
    trainer = ChunkTrainer(setup.task, setup.population, setup.config)
    trainer.begin(plan, sums=True, method=TrainingMethod(stacks=engine.endswith("stacks")))
    trainer.answer(Chunk(plan.clients))
    summed = trainer.answer(Flush())
    assert not summed.fault
    return [*summed.aside, summed.partial]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", MODELS)
def test_an_engine_gives_what_devices_give(kind, engine):
    setup = setup_of(kind)
    if "stack" in engine and (reason := why_not_stacked(setup)):
        assert "buffer" in reason or "shared between" in reason  # that these are not stacked is known before
        return
    parts = parts_of(setup.task)
    start = parts.moving
    plan = Plan(job="j", round=1, parameters=start, clients=tuple(setup.population.names()), train=setup.config.train,
                deadline_s=60, frozen=parts.frozen)  # fmt: skip
    wanted, seen = WeightedMean(start), WeightedMean(start)
    for client in plan.clients:
        own = train_locally(
            setup.task, start, plan.train, options=setup.population.options(client), round=1, client=client,
            frozen=plan.frozen,
        )  # fmt: skip
        wanted.add(Update(job="j", round=1, device=client, tree=own.tree, weight=own.weight))
    for answer in answers_of(engine, setup, plan):
        assert isinstance(answer, Update | Partial), answer
        (seen.merge if isinstance(answer, Partial) else seen.add)(answer)
    one, other = seen.result(), wanted.result()
    assert list(one) == list(start)
    for name, array in one.items():
        assert (array.dtype, array.shape) == (start[name].dtype, start[name].shape)
        close = {"bfloat16": 2e-2, "float16": 2e-3}.get(array.dtype.name, 1e-6 if is_float(array.dtype) else 0)
        np.testing.assert_allclose(array.astype(float), other[name].astype(float), rtol=0, atol=close, err_msg=name)


def test_what_is_kept_moves_as_it_should():
    """By hand: five clients with 1, 2, 3 .. batches an epoch and two epochs."""
    steps = np.array([2 * -(-(3 + 2 * part) // 4) for part in range(CLIENTS)])
    weights = np.array([3 + 2 * part for part in range(CLIENTS)])
    setup = setup_of("0-d counter")
    plan = dataclasses.replace(
        Plan(job="j", round=1, parameters=initial_parameters(setup.task), clients=tuple(setup.population.names()),
             train=setup.config.train, deadline_s=60)
    )  # fmt: skip
    mean = WeightedMean(plan.parameters)
    for answer in LoopFleet(setup).collect(plan):
        mean.add(answer)
    assert mean.result()["kept"] == np.rint(np.average(steps, weights=weights))
