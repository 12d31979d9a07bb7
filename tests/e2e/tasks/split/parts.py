"""A small network for training in parts: pictures of the device's own part of a fixed set."""

import time

import torch
from torch import nn

from edgefl import Task

NUM = 48


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 8, 3, padding=1, stride=2)
        self.head = nn.Linear(8 * 16, 4)

    def forward(self, pictures):
        hidden = torch.relu(self.second(torch.relu(self.first(pictures))))
        return self.head(torch.flatten(hidden, 1))


class Slow(torch.utils.data.Dataset):
    """Pictures that take time to read, so that a training can be disturbed."""

    def __init__(self, pictures, labels, wait_s):
        self.pictures, self.labels, self.wait_s = pictures, labels, wait_s

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, at):
        time.sleep(self.wait_s)
        return self.pictures[at], self.labels[at]


def data(part="0", wait_s="0"):
    draw = torch.Generator().manual_seed(100 + int(part))
    pictures = torch.randn(NUM, 1, 8, 8, generator=draw)
    labels = (pictures[:, 0, :4].sum((1, 2)) > 0).long() + 2 * (pictures[:, 0, 4:].sum((1, 2)) > 0).long()
    return Slow(pictures, labels, float(wait_s)) if float(wait_s) else (pictures, labels)


def momentum(parameters, lr):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.5)


task = Task(
    name="parts", model=Net, loss=nn.functional.cross_entropy, train_data=data, test_data=data, optimizer=momentum,
    metrics={"accuracy": lambda outputs, targets: (outputs.argmax(1) == targets).float().mean()},
)  # fmt: skip
