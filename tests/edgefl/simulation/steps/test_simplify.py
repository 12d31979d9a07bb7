"""A simplified graph gives the numbers of the one that it was made from."""

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from edgefl.simulation.steps.simplify import simplify, specialize


def recorded(function, *arguments):
    return make_fx(function)(*arguments)


def targets(bound):
    return [node.target for node in bound.func.__self__.graph.nodes if node.op == "call_function"]


def test_operations_are_called_by_torchs_own_functions():
    module = recorded(lambda a, b: torch.relu(a @ b).sum(0), torch.randn(3, 4), torch.randn(4, 2))
    bound = specialize(module)
    assert not any(isinstance(target, torch._ops.OpOverload) for target in targets(bound))
    a, b = torch.randn(3, 4), torch.randn(4, 2)
    assert torch.equal(bound(a, b), module(a, b))
    assert any(isinstance(node.target, torch._ops.OpOverload) for node in module.graph.nodes)  # that one is as it was


def test_views_of_constants_are_made_once_and_follow_their_values():
    weight = torch.randn(2, 4)
    module = recorded(lambda w, x: x @ w.t(), weight, torch.randn(3, 4))
    bound = specialize(module, [weight])
    assert torch.t not in targets(bound)
    x = torch.randn(3, 4)
    assert torch.equal(bound(x), x @ weight.t())
    weight += 1
    assert torch.equal(bound(x), x @ weight.t())


def test_a_pooled_gradient_is_brought_into_the_layout_of_its_inputs():
    def step(images):
        leaf = images.detach().requires_grad_()
        loss = nn.functional.max_pool2d(leaf, 2).flatten(1).square().sum()
        return torch.autograd.grad(loss, leaf)[0]

    images = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    module = recorded(step, images)
    simplify(module.graph)
    module.recompile()
    names = [node.target for node in module.graph.nodes]
    (backward,) = (n for n in module.graph.nodes if n.target is torch.ops.aten.max_pool2d_with_indices_backward.default)
    assert backward.args[0].target is torch.ops.aten.clone.default
    assert torch.ops.aten.detach.default not in names
    assert torch.equal(module(images), step(images))
