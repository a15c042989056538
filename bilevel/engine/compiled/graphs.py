"""Graphs made of a traced graph: its parts, its random numbers drawn beforehand, what it costs."""

import copy
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry

_OF_SHAPES = (
    torch.ops.aten.bernoulli.p,
    torch.ops.aten.uniform.default,
    torch.ops.aten.normal_functional.default,
    torch.ops.aten.exponential.default,
    torch.ops.aten.geometric.default,
    torch.ops.aten.cauchy.default,
    torch.ops.aten.log_normal.default,
    torch.ops.aten.rand_like.default,
    torch.ops.aten.randn_like.default,
    torch.ops.aten.randint_like.default,
    torch.ops.aten.randint_like.low_dtype,
    torch.ops.aten.native_dropout.default,
)
"""Random operators that take from their first argument its shape, dtype and device alone."""


def part(graph: fx.GraphModule, chosen: Sequence[int]) -> fx.GraphModule:
    """The graph with some of its outputs, and without what only the others need. Inputs stay as they are."""
    made = copy.deepcopy(graph)
    found = outputs(made)
    _end(made).args = (tuple(found[i] for i in chosen),)
    return tidy(made)


def tidy(graph: fx.GraphModule) -> fx.GraphModule:
    """The graph with plain arguments and a plain result, without what nobody needs and without `detach`."""
    graph.graph.set_codegen(fx.graph.CodeGen())
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    graph.recompile()
    return graph


def hoisted(graph: fx.GraphModule) -> fx.GraphModule | None:
    """Take the drawing of random numbers out of a graph, where the inputs do not decide about them.

    Returns:
        a graph without inputs that draws all numbers in the order in which they were traced; they are the last
        placeholders of `graph`, which is changed. None where nothing is drawn.

    Raises:
        ValueError: what is drawn depends on the numbers of an input.
    """
    drawing = [node for node in graph.graph.nodes if _draws(node)]
    if not drawing:
        return None
    prologue, known = fx.Graph(), dict[fx.Node, fx.Node]()
    last, results = [node for node in graph.graph.nodes if node.op == "placeholder"][-1], list[fx.Node]()
    for node in drawing:
        drawn = _again(node, prologue, known)
        dropout = node.target is torch.ops.aten.native_dropout.default
        # Of dropout's (output, mask) = (input mask / (1 - p), mask) the mask is drawn.
        results.append(prologue.call_function(operator.getitem, (drawn, 1)) if dropout else drawn)
        with graph.graph.inserting_after(last):
            last = graph.graph.placeholder(f"random_{len(results) - 1}")
        last.meta["val"] = node.meta["val"][1] if dropout else node.meta["val"]
        if dropout:
            _replace_dropout(graph.graph, node, last)
        else:
            node.replace_all_uses_with(last)
            graph.graph.erase_node(node)
    prologue.output(tuple(results))
    tidy(graph)
    return fx.GraphModule({}, prologue)


def _again(node: fx.Node, prologue: fx.Graph, known: dict[fx.Node, fx.Node]) -> fx.Node:
    """A node, with what it needs, in the prologue."""
    if node in known:
        return known[node]
    if node.op == "placeholder":
        raise ValueError("it draws random numbers from a distribution that depends on its inputs")
    if node.target in _OF_SHAPES:
        like = node.args[0].meta["val"]  # type: ignore[union-attr]
        # (Numbers are drawn in the order of memory.)
        shape = prologue.call_function(
            torch.ops.aten.empty_strided.default,
            (list(like.shape), list(like.stride())),
            {"dtype": like.dtype, "device": like.device},
        )
        # (bernoulli.p stands for bernoulli_, which keeps the order of memory; by itself it does not.)
        inside = node.target is torch.ops.aten.bernoulli.p and 0 not in like.stride()
        target = torch.ops.aten.bernoulli_.float if inside else node.target
        known[node] = prologue.call_function(target, (shape, *node.args[1:]), dict(node.kwargs))
    else:
        known[node] = prologue.node_copy(node, lambda each: _again(each, prologue, known))
    return known[node]


def _replace_dropout(graph: fx.Graph, node: fx.Node, mask: fx.Node) -> None:
    data, chance = node.args[0], node.args[1]
    assert isinstance(chance, float)
    with graph.inserting_before(node):
        kept = graph.call_function(torch.ops.aten.mul.Tensor, (data, mask))
        scaled = graph.call_function(torch.ops.aten.mul.Scalar, (kept, 0.0 if chance == 1 else 1 / (1 - chance)))
        kept.meta["val"] = scaled.meta["val"] = node.meta["val"][0]
    for user in list(node.users):
        assert user.target is operator.getitem, "a pair is only taken apart"
        user.replace_all_uses_with((scaled, mask)[user.args[1]])  # type: ignore[index]
        graph.erase_node(user)
    graph.erase_node(node)


def _draws(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    for i, argument in enumerate(node.target._schema.arguments):
        if argument.name == "dropout_p":  # attention draws where it drops
            return bool(node.args[i] if i < len(node.args) else node.kwargs.get("dropout_p", argument.default_value))
    return True


def costs(graph: fx.GraphModule) -> tuple[int, int]:
    """FLOPs of matrix products and convolutions, and bytes read and written by all operators, as traced (not fused)."""
    flops = moved = 0
    for node in graph.graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem or _is_view(node):
            continue
        packet = getattr(node.target, "overloadpacket", None)
        read = fx.node.map_arg(node.args, lambda each: each.meta.get("val"))
        kwargs = fx.node.map_arg(node.kwargs, lambda each: each.meta.get("val"))
        out = node.meta.get("val")
        if packet in flop_registry:
            flops += int(flop_registry[packet](*read, **kwargs, out_val=out))
        moved += sum(_bytes(each) for each in (*_tensors(read), *_tensors(kwargs), *_tensors(out)))
    return flops, moved


def _tensors(value: Any) -> list[Tensor]:
    return [each for each in torch.utils._pytree.tree_leaves(value) if isinstance(each, Tensor)]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _is_view(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view


def outputs(graph: fx.GraphModule) -> list[Any]:
    """What a graph returns."""
    found = _end(graph).args[0]
    assert isinstance(found, (tuple, list)), "a traced graph returns a tuple"
    return list(found)


def _end(graph: fx.GraphModule) -> fx.Node:
    return next(node for node in reversed(graph.graph.nodes) if node.op == "output")


def split(graph: fx.GraphModule, first: int, weights: Sequence[int]) -> tuple[fx.GraphModule, fx.GraphModule]:
    """A graph in two: what the weights do not enter, computed once, and products with weights, computed many times.

    Between them the fewest bytes are kept for which no matrix product is repeated: torch's partitioner, for which the
    weights are what cotangents are in training.

    Args:
        graph: changed.
        first: how many outputs, the first ones, come out of the first part.
        weights: which inputs are weights; they come last.

    Returns:
        (inputs but the weights) -> (the first outputs, then what is kept), and (what is kept, weights) -> the others.
    """
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    places = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for i, node in enumerate(places):
        node.name = node.target = f"tangents_{i}" if i in weights else f"primals_{i}"  # what the partitioner reads
    graph.recompile()
    inputs = [node.meta["val"] for node in places]
    primals = [each for i, each in enumerate(inputs) if i not in weights]
    tangents = [each for i, each in enumerate(inputs) if i in weights]
    fwd, bwd = min_cut_rematerialization_partition(graph, (primals, tangents), num_fwd_outputs=first)
    return fwd, bwd
