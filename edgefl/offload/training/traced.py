"""Parts of any torch module, cut in the graph that `torch.export` traces.

The graph is static: it is traced for inputs of one shape, in training mode. A part runs a range of its nodes, one after
the other. What later parts read of earlier ones crosses, also over two cuts; inputs that are needed late go along.
A cut is named by a node, or by a module (`layer2`, `blocks.3`): then it is behind the module's last node.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from edgefl.errors import ConfigError
from edgefl.offload.graph import PREFIX
from edgefl.offload.training.parts import INPUT, LayerRange, ModelParts, Values
from edgefl.training.quiet import quiet_tracing
from edgefl.training.samples import require_torch
from edgefl.training.structures import Structure, arguments

if TYPE_CHECKING:
    import torch
    from torch import fx

_MAX_LISTED = 40  # cuts in a message


class TracedPart:
    """A range of a traced graph's nodes."""

    def __init__(
        self, nodes: Sequence[fx.Node], graph: fx.GraphModule, names: Mapping[str, str], given: Collection[fx.Node],
        also: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """`names` are all names in the model's state, with one name for each tied tensor.

        `given` are nodes whose values others read, `also` values that are needed beside what the nodes read.
        """
        self._nodes, here = nodes, set(nodes)
        read = {one: None for node in nodes for one in node.all_input_nodes if one not in here}
        self._attributes = {node: str(node.target) for node in read if node.op == "get_attr"}
        self._read = [node for node in read if node.op != "get_attr"]
        self._given = [node for node in nodes if node in given]
        self.gives = [value_name(node) for node in self._given]
        values = [value_name(node) for node in self._read]
        self.needs = [*values, *(one for one in also if one not in values and one not in self.gives)]
        self.tensors = list(dict.fromkeys(names[name] for name in self._attributes.values() if name in names))
        self._names = names
        self._constants = {
            name: _constant(graph, name) for name in self._attributes.values() if name not in names
        }  # fmt: skip
        self._cloned = {node for node in self._read if any(_changes(user) for user in node.users if user in here)}

    def run(self, state: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> Values:
        known: dict[Any, Any] = {
            node: self._constants[name] if name in self._constants else state[self._names[name]]
            for node, name in self._attributes.items()
        }
        for node in self._read:
            value = values[value_name(node)]
            known[node] = value.clone() if node in self._cloned else value
        for node in self._nodes:
            operation: Any = node.target
            known[node] = operation(*_filled(node.args, known), **_filled(node.kwargs, known))
        return {name: known[node] for name, node in zip(self.gives, self._given, strict=True)}


def traced_parts(
    module: torch.nn.Module, inputs: Structure, cut: str, last_cut: str = "", *, frozen: bool = False,
    names: Mapping[str, str] | None = None,
) -> ModelParts:  # fmt: skip
    """Return the parts of a module for inputs of this shape; the module is not changed.

    `names` are those of its tensors in the whole model, by its own; None = `one_name_each` of it.
    `frozen`: the first part runs as in evaluation, so that a sample's activations are always the same.
    Raises ConfigError for cuts that it does not have, and for a module that cannot be traced as one graph.
    """
    require_torch("splitting a module")
    graph, form = _traced(module, inputs)
    operations = [node for node in graph.graph.nodes if node.op == "call_function"]
    ends = [_end_of(operations, one, module) for one in (cut, last_cut) if one]
    if len(ends) > 1 and ends[1] <= ends[0]:
        raise ConfigError(
            f"train.split.last_cut={last_cut!r} is not behind train.split.cut={cut!r} in {type(module).__name__}; the "
            "cloud would have no layer"
        )
    names = names or one_name_each(module)
    bounds = [0, *ends, len(operations)]
    ranges = [operations[start:end] for start, end in pairwise(bounds)]
    if frozen:
        ranges[0] = _as_evaluated(ranges[0], module)
    ranges = _with_constants(ranges, operations)
    made: Sequence[Any] = next(node for node in graph.graph.nodes if node.op == "output").args[0]
    returned = [value_name(one) for one in made if hasattr(one, "op")]  # some may be made before the last part
    given = _given(ranges, [one for one in made if hasattr(one, "op")])
    parts: list[LayerRange] = [
        TracedPart(nodes, graph, names, given[at], returned if at == len(ranges) - 1 else ())
        for at, nodes in enumerate(ranges)
    ]
    return ModelParts(parts=parts, outputs=partial(_outputs, made=made, form=form), num_outputs=_num_outputs(made))


def list_cuts(module: torch.nn.Module, inputs: Structure) -> list[str]:
    """Return the names of all nodes behind which a module can be cut."""
    graph, _ = _traced(module, inputs)
    operations = [node for node in graph.graph.nodes if node.op == "call_function"]
    return [node.name for at, node in enumerate(operations[:-1]) if operations[at + 1].target is not operator.getitem]


def one_name_each(module: torch.nn.Module, whole: torch.nn.Module | None = None) -> dict[str, str]:
    """Return for each name in the state dict the first name of the same tensor: tied tensors have several.

    With `whole`, it is the first name in that one, of which the module is a part.
    """
    first: dict[int, str] = {}
    for name, one in (whole or module).state_dict(keep_vars=True).items():
        first.setdefault(id(one), name)
    return {name: first[id(one)] for name, one in module.state_dict(keep_vars=True).items()}


def value_name(node: fx.Node) -> str:
    """Return the name of a node's value, as it crosses."""
    return f"{INPUT}.{node.meta[INPUT]}" if INPUT in node.meta else str(node.name)


def input_values(inputs: Structure) -> Values:
    """Return the leaves of a model's inputs as values."""
    from torch.utils import _pytree as pytree

    return {f"{INPUT}.{at}": one for at, one in enumerate(pytree.tree_leaves(inputs))}


def _traced(module: torch.nn.Module, inputs: Structure) -> tuple[fx.GraphModule, Any]:
    """Return the graph of a module in training mode, and the structure of its outputs."""
    import torch

    positional, by_keyword = arguments(module, inputs)
    try:
        with quiet_tracing():
            exported = torch.export.export(copy.deepcopy(module).train(), positional, by_keyword)
    except (RuntimeError, ValueError, AssertionError, TypeError, NotImplementedError) as cause:
        raise ConfigError(
            f"{type(module).__name__} cannot be traced as one graph, and so not be cut: {_first_line(cause)}. Control "
            "flow that depends on values cannot be traced; a decoder of transformers is cut by its number of blocks"
        ) from cause
    graph: Any = exported.module(check_guards=False)
    for at, node in enumerate(node for node in graph.graph.nodes if node.op == "placeholder"):
        node.meta[INPUT] = at
    for node in graph.graph.nodes:
        if node.op not in {"placeholder", "get_attr", "call_function", "output"}:
            raise ConfigError(f"{type(module).__name__} has {node.op} {node.name!r} in its graph, which cannot be cut")
        if isinstance(node.target, torch._ops.HigherOrderOperator):  # noqa: SLF001 - it has no public name
            raise ConfigError(
                f"{type(module).__name__} has control flow ({node.name}); only a graph without it can be cut"
            )
    return graph, exported.call_spec.out_spec


def _first_line(cause: Exception) -> str:
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0][:300]


def _end_of(operations: Sequence[fx.Node], cut: str, module: torch.nn.Module) -> int:
    """Return how many operations are before a cut."""
    wanted = cut.removeprefix(PREFIX)
    at = next((n for n, node in enumerate(operations) if node.name == wanted), None)
    if at is None:
        inside = [n for n, node in enumerate(operations) if wanted in _modules_of(node)]
        at = inside[-1] if inside else None
    if at is not None:
        while at + 1 < len(operations) and operations[at + 1].target is operator.getitem:
            at += 1
        if at + 1 < len(operations):
            return at + 1
        raise ConfigError(
            f"{type(module).__name__}: {cut!r} is its last layer, so nothing would be left behind the cut"
        )
    known = list(dict.fromkeys(name for node in operations for name in _modules_of(node)))
    raise ConfigError(
        f"{type(module).__name__} has no layer {cut!r}; cut behind a module ({', '.join(known[:_MAX_LISTED])}) or a "
        f"node ({', '.join(node.name for node in operations[:_MAX_LISTED])})"
    )


def _with_constants(ranges: Sequence[Sequence[fx.Node]], operations: Sequence[fx.Node]) -> list[list[fx.Node]]:
    """Return the ranges with the operations that depend on no input where they are needed: they never cross."""
    depends: dict[Any, bool] = {}
    for node in operations:
        depends[node] = any(one.op == "placeholder" or depends.get(one, False) for one in node.all_input_nodes)
    place = {node: at for at, node in enumerate(operations)}
    found = []
    for nodes in ranges:
        wanted, todo = set(nodes), list(nodes)
        while todo:
            for one in todo.pop().all_input_nodes:
                if one.op == "call_function" and one not in wanted and not depends[one]:
                    wanted.add(one)
                    todo.append(one)
        found.append(sorted(wanted, key=place.__getitem__))
    return found


def _given(ranges: Sequence[Sequence[fx.Node]], made: Sequence[fx.Node]) -> list[set[fx.Node]]:
    """Return for each range its nodes that a later range reads without having them, or that the model returns."""
    found: list[set[fx.Node]] = [set() for _ in ranges]
    has, returned = [set(nodes) for nodes in ranges], set(made)
    for at, nodes in enumerate(ranges):
        wanted = {one for node in nodes for one in node.all_input_nodes}
        for one in wanted | returned if at == len(ranges) - 1 else wanted:
            owner = at if one in has[at] else next((n for n, other in enumerate(has) if one in other), None)
            if owner is not None and (owner != at or (one in returned and at == len(ranges) - 1)):
                found[owner].add(one)
    return found


def _as_evaluated(nodes: Sequence[fx.Node], module: torch.nn.Module) -> list[fx.Node]:
    """Return operations that do what they would in evaluation: no dropout, batch norm by its running statistics."""
    import torch

    aten, kept = torch.ops.aten, []
    for node in nodes:
        if node.target is aten.dropout.default:
            node.update_arg(2, False)  # noqa: FBT003 - its position
        elif node.target is aten.batch_norm.default:
            node.update_arg(5, False)  # noqa: FBT003
        elif node.target is aten.add_.Tensor and getattr(node.args[0], "op", "") == "get_attr":
            continue  # batch norm counts its batches
        elif torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and not _is_sure(node):
            raise ConfigError(
                f"{type(module).__name__} draws random numbers in its first part ({node.name}), so a sample's "
                "activations would not stay the same. Set train.split.device_part='trained', or cut before it"
            )
        kept.append(node)
    return kept


def _is_sure(node: fx.Node) -> bool:
    """Whether an operation that may drop values drops none: attention with dropout_p 0."""
    import torch

    if node.target is not torch.ops.aten.scaled_dot_product_attention.default:
        return False
    given = {**node.kwargs, **({"dropout_p": node.args[4]} if len(node.args) > 4 else {})}
    return not given.get("dropout_p", 0.0)


def _modules_of(node: fx.Node) -> list[str]:
    return [name for name, _ in (node.meta.get("nn_module_stack") or {}).values() if name]


def _changes(node: fx.Node) -> bool:
    """Whether an operation changes an argument in place."""
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)


def _constant(graph: Any, name: str) -> Any:
    found = graph
    for step in name.split("."):
        found = getattr(found, step)
    return found


def _filled(given: Any, known: Mapping[Any, Any]) -> Any:
    from torch import fx

    return fx.node.map_arg(given, lambda node: known[node])


def _num_outputs(made: Sequence[Any]) -> int:
    shapes = [tuple(one.meta["val"].shape) for one in made if hasattr(one, "op")]
    return int(shapes[0][1]) if len(made) == len(shapes) == 1 and len(shapes[0]) == 2 else 0


def _outputs(values: Mapping[str, torch.Tensor], made: Sequence[Any], form: Any) -> Any:
    from torch.utils import _pytree as pytree

    leaves = [values[value_name(one)] if hasattr(one, "op") else one for one in made]
    return pytree.tree_unflatten(leaves, form)
