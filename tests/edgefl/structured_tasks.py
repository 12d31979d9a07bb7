"""Tasks whose inputs, targets and outputs are structures, and the same ones of single tensors."""

from __future__ import annotations

import torch

from edgefl.task import Task

mse = torch.nn.functional.mse_loss


def numbers(part, rows=None):
    """Return inputs (N, 5) and targets (N, 2) of one client; clients have different numbers of samples."""
    drawn = torch.Generator().manual_seed(int(part))
    rows = rows or 9 + int(part)
    inputs = torch.randn(rows, 5, generator=drawn)
    return inputs, inputs[:, :2] * 2 - 1


class Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.head = torch.nn.Linear(5, 6), torch.nn.Linear(6, 2)

    def forward(self, inputs):
        return self.head(torch.tanh(self.hidden(inputs)))


class Spread(Plain):
    """Inputs in two parts."""

    def forward(self, left, right):
        return super().forward(torch.cat([left, right], 1))


class Whole(Plain):
    """Inputs in one argument, a dict within a tuple; two outputs."""

    def forward(self, batch):
        left, rest = batch
        outputs = super().forward(torch.cat([left, rest["right"]], 1))
        return {"first": outputs[:, 0], "others": (outputs[:, 1:],)}


def plain_part(part="0", parts="1"):
    return numbers(part)


def tuple_part(part="0", parts="1"):
    inputs, targets = numbers(part)
    return (inputs[:, :2], inputs[:, 2:]), targets


def dict_part(part="0", parts="1"):
    inputs, targets = numbers(part)
    return {"right": inputs[:, 2:].numpy(), "left": inputs[:, :2].numpy()}, targets


def deep_part(part="0", parts="1"):
    inputs, targets = numbers(part)
    wanted = {"first": targets[:, 0], "others": (targets[:, 1:],)}
    return (inputs[:, :2], {"right": inputs[:, 2:]}), wanted


def both(outputs, targets):
    """The mean over both columns."""
    return (mse(outputs["first"], targets["first"]) + mse(outputs["others"][0], targets["others"][0])) / 2


def first_error(outputs, targets):
    return (outputs["first"] - targets["first"]).abs().mean()


plain = Task(name="plain", model=Plain, loss=mse, train_data=plain_part, test_data=plain_part)
tuples = Task(name="tuples", model=Spread, loss=mse, train_data=tuple_part, test_data=tuple_part)
dicts = Task(name="dicts", model=Spread, loss=mse, train_data=dict_part, test_data=dict_part)
deep = Task(
    name="deep", model=Whole, loss=both, train_data=deep_part, test_data=deep_part, metrics={"first_error": first_error}
)
