"""A model that has a tensor of each dtype that the wire carries, and of odd shapes; some of its buffers count."""

import numpy as np
import torch
from torch import nn

from edgefl import Task

BUFFERS = {
    "mask": torch.tensor([True, False, True]),
    "flag": torch.tensor(True),
    "count": torch.tensor(2**60 + 1),
    "i8": torch.tensor([-128, 127], dtype=torch.int8),
    "i16": torch.tensor([-5], dtype=torch.int16),
    "i32": torch.tensor([[7]], dtype=torch.int32),
    "u8": torch.tensor([250, 1], dtype=torch.uint8),
    "u16": torch.tensor([65535], dtype=torch.uint16),
    "u32": torch.tensor(2**32 - 1, dtype=torch.uint32),
    "u64": torch.tensor([2**63 - 1], dtype=torch.uint64),
    "f16": torch.tensor([0.5], dtype=torch.float16),
    "bf16": torch.tensor(2.5, dtype=torch.bfloat16),
    "none": torch.empty(3, 0, dtype=torch.int64),
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.brain = nn.Linear(4, 4, dtype=torch.bfloat16)
        self.head = nn.Linear(4, 3, dtype=torch.float64)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.empty(0))
        self.turned = nn.Parameter(torch.arange(6.0).view(2, 3).t())
        for name, value in BUFFERS.items():
            self.register_buffer(name, value.clone())

    def forward(self, inputs):
        if self.training:
            self.count.add_(1)
            self.u8.add_(1)
        inner = self.brain(self.table(inputs).mean(1).bfloat16()).double()
        return (self.head(inner) * self.scale + 1e-3 * self.turned.sum()).masked_fill(~self.mask, -3.0)


def load(part="0", parts="1"):
    inputs = np.random.default_rng(int(part)).integers(0, 7, (20, 5))
    return inputs, np.where(inputs[:, 0] > 3, 0, 2)


task = Task(name="every-dtype", model=Net, loss=nn.functional.cross_entropy, train_data=load)
