"""Two stages of a torch module, for training or inference without ONNX: cut in its traced graph.

The tracer is torch's (`torch.distributed.pipelining.pipeline`; it needs no process group). What it does not say:
`.eval()` on a stage changes nothing, since dropout and batch norm are traced as they were: trace one split for
training and one for evaluation. Shapes are those of the example: pad what is smaller. A module's forward is changed by
the tracer, so it gets a copy. A weight that both stages read is in both: after a step of training both copies must get
the sum of their gradients, else `merge_states` refuses them.
Invariant: stages have the names of the module's state dict, so `merge_states` gives it back.
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from edgefl.errors import ConfigError
from edgefl.offload.graph import PREFIX
from edgefl.training.quiet import quiet_tracing
from edgefl.training.samples import require_torch

if TYPE_CHECKING:
    import torch
    from torch import fx

State = Mapping[str, "torch.Tensor"]


class TorchSplit:
    """A module in two stages; `head` and `tail` are modules with parameters of their own."""

    def __init__(self, graph: fx.GraphModule, whole: State, form: Any) -> None:
        """`graph` calls both stages; `whole` is the source's state, with ties, `form` the structure of its outputs."""
        calls = [node for node in graph.graph.nodes if node.op == "call_module"]
        self._inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        self._head_call, self._tail_call = calls
        self._output = next(node for node in graph.graph.nodes if node.op == "output")
        self.head: torch.nn.Module = graph.get_submodule(str(self._head_call.target))
        self.tail: torch.nn.Module = graph.get_submodule(str(self._tail_call.target))
        self._whole = {name: one.detach().clone() for name, one in whole.items()}
        self._names, self._form = _shared_names(whole), form

    def run_head(self, *inputs: torch.Tensor) -> tuple[list[torch.Tensor], dict[Any, Any]]:
        """Return the tensors that cross, with inputs that are needed late, and what the head knows of the outputs."""
        known: dict[Any, Any] = dict(zip(self._inputs, inputs, strict=True))
        known[self._head_call] = self.head(*(_value(one, known) for one in self._head_call.args))
        return [_value(one, known) for one in self._tail_call.args], known

    def run_tail(self, crossing: Sequence[torch.Tensor]) -> Any:
        """Return what the tail makes of what crossed: the module's outputs without their structure."""
        return self.tail(*crossing)

    def __call__(self, *inputs: torch.Tensor) -> Any:
        """Run both stages; return what the module returns."""
        crossing, known = self.run_head(*inputs)
        known[self._tail_call] = self.run_tail(crossing)
        from torch.utils import _pytree as pytree

        found = pytree.tree_map(lambda one: _value(one, known), self._output.args[0])
        return pytree.tree_unflatten(pytree.tree_leaves(found), self._form)

    def states(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Return the state of both stages, by the names in the module; tied tensors have all their names.

        What no stage reads, such as a counter of batches in evaluation, is in the first one, as it was.
        """
        head, tail = self._state(self.head), self._state(self.tail)
        return head | {name: one for name, one in self._whole.items() if name not in head and name not in tail}, tail

    def _state(self, stage: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {other: one for name, one in stage.state_dict().items() for other in self._names.get(name, (name,))}


def torch_cuts(module: torch.nn.Module, inputs: Sequence[torch.Tensor], *, training: bool = False) -> list[str]:
    """Return the names of the cuts of a module for such inputs, in order: `split:` and a node of its traced graph."""
    return [f"{PREFIX}{node.name}" for node, _ in _borders(_traced(module, inputs, training=training))]


def split_torch(
    module: torch.nn.Module, inputs: Sequence[torch.Tensor], cut: str, *, training: bool = False
) -> TorchSplit:  # fmt: skip
    """Split a module behind a node of its graph; `training` says in which mode it is traced.

    The module is not changed, and shares no parameter with the stages. Raises ConfigError for an unknown cut, and for a
    module that cannot be traced.
    """
    require_torch("splitting a module")
    wanted, found = cut.removeprefix(PREFIX), list[str]()

    def policy(graph: fx.GraphModule) -> fx.GraphModule:
        import torch

        borders = {node.name: after for node, after in _borders(graph)}
        found.extend(borders)
        if (after := borders.get(wanted)) is not None:
            with graph.graph.inserting_before(after):
                graph.graph.call_function(torch.ops.pippy._pipe_split.default, (), {})  # noqa: SLF001 - as torch's own policies
            graph.recompile()
        return graph

    graph = _piped(copy.deepcopy(module).train(training), inputs, policy)
    if wanted not in found:
        raise ConfigError(f"{type(module).__name__} has no cut {cut!r}; `torch_cuts` lists its {len(found)} cuts")
    return TorchSplit(graph, module.state_dict(keep_vars=True), _form(module, inputs))


def merge_states(*stages: State) -> dict[str, torch.Tensor]:
    """Return the state of the whole module.

    Raises ConfigError if two stages have other values of one tensor: their copies were trained apart.
    """
    merged: dict[str, torch.Tensor] = {}
    for stage in stages:
        for name, one in stage.items():
            if name in merged and not _same(merged[name], one):
                raise ConfigError(
                    f"both stages have {name!r}, with other values: a tied weight was trained on both sides. Add the "
                    "gradients of its copies before each step"
                )
            merged.setdefault(name, one)
    return merged


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    import torch

    return torch.equal(one.cpu(), other.cpu())


def _piped(
    module: torch.nn.Module, inputs: Sequence[torch.Tensor], policy: Callable[[fx.GraphModule], fx.GraphModule]
) -> fx.GraphModule:  # fmt: skip
    from torch.distributed.pipelining import pipeline

    try:
        with quiet_tracing(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`isinstance", FutureWarning)  # of the tracer's own code
            graph: fx.GraphModule = pipeline(module, mb_args=tuple(inputs), split_policy=policy).split_gm
    except (RuntimeError, ValueError, AssertionError) as cause:
        raise ConfigError(f"{type(module).__name__} cannot be traced as one graph: {cause}") from cause
    return graph


def _traced(module: torch.nn.Module, inputs: Sequence[torch.Tensor], *, training: bool) -> Any:
    import torch

    require_torch("splitting a module")
    with quiet_tracing():
        return torch.export.export(copy.deepcopy(module).train(training), tuple(inputs)).module(check_guards=False)


def _borders(graph: Any) -> list[tuple[Any, Any]]:
    """Return the neighbours that a cut can be between: no operation and the item that is taken of its tuple."""
    operations = [node for node in graph.graph.nodes if node.op == "call_function"]
    return [(node, after) for node, after in pairwise(operations) if after.target is not operator.getitem]


def _form(module: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> Any:
    """Return the structure of a module's outputs."""
    import torch
    from torch.utils import _pytree as pytree

    with torch.no_grad():
        return pytree.tree_structure(copy.deepcopy(module).eval()(*inputs))


def _shared_names(whole: State) -> dict[str, list[str]]:
    """Return for each name in a module's state all names of its tensor."""
    groups: dict[int, list[str]] = {}
    for name, one in whole.items():
        groups.setdefault(id(one), []).append(name)
    return {name: names for names in groups.values() for name in names}


def _value(node: Any, known: Mapping[Any, Any]) -> Any:
    """Return the value of a node of the graph around the stages: known, or an item of a known one."""
    if not hasattr(node, "op") or node in known:
        return known[node] if hasattr(node, "op") else node
    if node.op == "call_function" and node.target is operator.getitem:
        return _value(node.args[0], known)[node.args[1]]
    raise ConfigError(f"the traced graph has {node.format_node()} between its stages, which is no item of a stage")
