"""A gradient that is left as two factors moves its parameter as the gradient itself would."""

import pytest
import torch
from torch import nn

from edgefl.simulation.steps.factored import FactoredGradients, unfactored
from edgefl.simulation.steps.recording import record


def dense(weight, bias, inputs):
    weight, bias = weight.detach().requires_grad_(), bias.detach().requires_grad_()
    loss = nn.functional.linear(inputs, weight, bias).relu().square().mean()
    return *torch.autograd.grad(loss, (weight, bias)), loss.detach()


def stacked(*tensors):
    """Do the same for each of a stack."""

    def loss(parameters, inputs):
        return nn.functional.linear(inputs, *parameters).relu().square().mean()

    gradients, losses = torch.func.vmap(torch.func.grad_and_value(loss))(tensors[:2], tensors[2])
    return *gradients, losses


def crossed(left, right, _):
    """Let either gradient be a product with the other parameter."""
    left, right = left.detach().requires_grad_(), right.detach().requires_grad_()
    loss = (left @ right).square().sum()
    return *torch.autograd.grad(loss, (left, right)), loss.detach()


@pytest.mark.parametrize(
    ("function", "shapes", "lengths"),
    [
        (dense, [(3, 5), (3,), (4, 5)], [2, 1]),  # the weight's is a product, the bias's a sum
        (crossed, [(3, 5), (5, 2), ()], [1, 1]),  # the first step would change a factor of the second
        (stacked, [(7, 3, 5), (7, 3), (7, 4, 5)], [2, 1]),
    ],
)
def test_a_step_is_that_of_the_gradients(function, shapes, lengths):
    torch.manual_seed(3)
    tensors = [torch.randn(shape) for shape in shapes]
    *wanted, loss = function(*tensors)
    module, indices = record(function, tensors, 2)
    assert [len(index) for index in indices] == lengths
    seen = FactoredGradients(module(*tensors), indices)
    torch.testing.assert_close(seen.materialized(), list(wanted))
    torch.testing.assert_close(seen.loss, loss)
    moved = [one.clone() for one in tensors[:2]]
    seen.apply(moved, 0.5)
    torch.testing.assert_close(moved, [one - 0.5 * grad for one, grad in zip(tensors, wanted, strict=False)])


def test_a_gradient_that_is_used_twice_stays_whole():
    def tied(one, other, inputs):
        *gradients, loss = dense(one, other, inputs)
        return gradients[0], gradients[0], loss

    tensors = [torch.randn(3, 5), torch.randn(3), torch.randn(4, 5)]
    module, indices = record(tied, tensors, 2)
    assert indices == unfactored(2)
    torch.testing.assert_close(list(module(*tensors)), list(tied(*tensors)))


def test_a_parameter_without_a_gradient_stays():
    one, other = torch.ones(2), torch.ones(2)
    FactoredGradients((None, torch.ones(2), torch.tensor(0.0)), unfactored(2)).apply([one, other], 0.5)
    assert (one.tolist(), other.tolist()) == ([1, 1], [0.5, 0.5])
