"""Federated averaging in plain PyTorch, and a library's own predictions: what edgefl's results must equal."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch

from edgefl.task import Task
from edgefl.trees import Tree


@dataclass(frozen=True)
class Prediction:
    """Inputs and the outputs that the model's own library computes, by the names that a request has."""

    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]


def tensors(value):
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, tuple):
        return tuple(tensors(one) for one in value)
    return {name: tensors(one) for name, one in value.items()} if isinstance(value, dict) else value


def called(model, inputs):
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def loaded(task: Task, parameters: Tree) -> torch.nn.Module:
    model = task.model()
    state = model.state_dict()
    for name, tensor in state.items():
        tensor.copy_(torch.from_numpy(np.array(parameters[name], dtype=np.float64)))  # exact, also from bfloat16
    model.load_state_dict(state)
    return model


def averaged(task: Task, start: Tree, *, rounds: int, epochs: int, lr: float, clients: int = 2) -> Tree:
    """Return the parameters after rounds in which each client takes a step of plain SGD per epoch."""
    model = loaded(task, start)
    for _ in range(rounds):
        sums, total = {name: torch.zeros_like(one, dtype=torch.float64) for name, one in model.state_dict().items()}, 0
        for part in range(clients):
            inputs, targets = (tensors(one) for one in task.train_data(part=str(part), parts=str(clients)))
            own = copy.deepcopy(model)
            optimizer = torch.optim.SGD(own.parameters(), lr=lr)
            for _ in range(epochs):
                optimizer.zero_grad()
                task.loss(called(own, inputs), targets).backward()
                optimizer.step()
            weight = len(next(iter(targets.values())) if isinstance(targets, dict) else targets)
            for name, one in own.state_dict().items():
                sums[name] += weight * one.double()
            total += weight
        state = {name: (sums[name] / total).to(one.dtype) for name, one in model.state_dict().items()}
        model.load_state_dict(state)
    return {name: one.double().numpy() for name, one in model.state_dict().items()}


def predicted(task: Task, parameters: Tree, rows: int, size: int | None = None) -> Prediction:
    """Return what PyTorch predicts for the first held-out samples, cut to a size of the second dimension."""
    inputs, _ = (tensors(one) for one in task.test_data())
    names = {tuple: ("left", "right"), dict: tuple(inputs) if isinstance(inputs, dict) else ()}
    parts = inputs if isinstance(inputs, tuple) else tuple(inputs.values()) if isinstance(inputs, dict) else (inputs,)
    parts = tuple(one[:rows] if size is None else one[:rows, :size] for one in parts)
    by_name = dict(zip(names.get(type(inputs), ("input",)), parts, strict=True))
    model = loaded(task, parameters).eval()
    with torch.no_grad():
        given = by_name if isinstance(inputs, dict) else parts if isinstance(inputs, tuple) else parts[0]
        outputs = called(model, given)
    found = outputs if isinstance(outputs, dict) else {"output": outputs}
    return Prediction(*({name: array(one) for name, one in side.items()} for side in (by_name, found)))


def array(tensor: torch.Tensor) -> np.ndarray:
    """As a request has it: bfloat16 is sent as float32."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
