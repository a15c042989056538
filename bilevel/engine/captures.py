"""What a function uses without being given it: tensors that require grad, modules, compiled parts.

Two ways. The graph of a run holds every captured tensor that a derivative would reach, whatever way the function came
to it; that search is complete, and names leaves. The closure, defaults and attributes of a function hold the tensors
by name; that search finds a tensor again of which the graph knows only the place.
"""

import dis
import functools
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

_DEEP = 6
"""Containers and closures inside each other that are searched."""
_MANY = 20_000
"""Objects that are looked at."""

Edge = tuple[Node, int]
Entries = tuple[dict[int, Tensor], set[Edge]]
"""Leaves by their ids, and the places of what operators made, that a graph was entered by."""


def captured(outputs: Sequence[Tensor], entries: Entries, function: Any) -> list[Tensor]:
    """The tensors of `entries`.

    Args:
        outputs: of a run of the function.
        entries: by what tensors its graph was entered.
        function: what was run.

    Raises:
        ValueError: one of them is the result of operators and is not found by name, or leads to another of them.
    """
    leaves, edges = list(entries[0].values()), entries[1]
    if not edges:
        return leaves
    found: dict[Edge, Tensor] = {}
    for tensor in (*outputs, *reachable(function, Tensor)):
        if tensor.grad_fn is not None and (edge := (tensor.grad_fn, tensor.output_nr)) in edges:
            found.setdefault(edge, tensor)
    name = name_of(function)
    if len(found) < len(edges):
        raise ValueError(
            f"the rematerialized block {name} uses a tensor that was computed outside of it and requires grad (made by "
            f"{next(node.name() for node, nr in edges if (node, nr) not in found)}). Give it to the block as an "
            f"argument"
        )
    inputs = [*leaves, *found.values()]
    if len(inputs) > 1 and _dependent(leaves, list(found)):
        raise ValueError(
            f"the rematerialized block {name} uses two tensors from outside that require grad, one of which was "
            f"computed from the other. Give them to the block as arguments"
        )
    return inputs


def entries(
    outputs: Sequence[Tensor],
    own: Sequence[Tensor],
    start: int,
    *,
    before: Entries | None = None,
    graph: dict[Node, list[Node]] | None = None,
) -> Entries:
    """By what tensors the graph of a run was entered, apart from its arguments.

    Args:
        outputs: of the run.
        own: its arguments: leaves made for this run.
        start: the sequence number of autograd's nodes when the run began.
        before: those of another run, which may have been in another thread, where numbers are others.
        graph: is filled with the nodes of the run, and what each leads to.
    """
    known, leaves, edges = {id(tensor) for tensor in own}, dict[int, Tensor](), set[Edge]()
    seen, queue = set[Node](), list[Edge]()
    for tensor in outputs:
        if tensor.grad_fn is not None:
            queue.append((tensor.grad_fn, tensor.output_nr))
        elif tensor.requires_grad and id(tensor) not in known:
            leaves[id(tensor)] = tensor
    while queue:
        node, place = queue.pop()
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor) and not node.next_functions:
            if id(leaf) not in known:
                leaves[id(leaf)] = leaf
        elif node._sequence_nr() < start or (before is not None and (node, place) in before[1]):
            edges.add((node, place))
        elif node not in seen:
            seen.add(node)
            following = [(each, nr) for each, nr in node.next_functions if each is not None]
            if graph is not None:
                graph[node] = [each for each, _ in following]
            queue += following
    return leaves, edges


def _dependent(leaves: Sequence[Tensor], edges: Sequence[Edge]) -> bool:
    """Whether one of the tensors lies behind another."""
    ends, targets = {id(leaf) for leaf in leaves}, {node for node, _ in edges}
    if len(targets) < len(edges):
        return True  # two results of one operator: gradients to one would be taken for the other's as well
    for begin in targets:
        seen, queue = {begin}, [begin]
        while queue:
            for node, _ in queue.pop().next_functions:
                if node is None or node in seen:
                    continue
                if node in targets or id(getattr(node, "variable", None)) in ends:
                    return True
                seen.add(node)
                queue.append(node)
    return False


def reachable(function: Any, kind: type | tuple[type, ...]) -> Iterator[Any]:
    """Objects of a kind in the closure, the defaults, the attributes and the named globals of a function."""
    seen, queue = set[int](), [(function, 0)]
    while queue and len(seen) < _MANY:
        value, depth = queue.pop()
        if id(value) in seen or depth > _DEEP:
            continue
        seen.add(id(value))
        if isinstance(value, kind):
            yield value
        queue += [(part, depth + 1) for part in _parts(value, depth)]


def _parts(value: Any, depth: int) -> list[Any]:
    if isinstance(value, types.FunctionType):
        cells = [_content(cell) for cell in value.__closure__ or ()]
        named = [value.__globals__[name] for name in value.__code__.co_names if name in value.__globals__]
        return [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *named]
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, nn.Module):
        return [*value.modules(), *vars(value).values()]
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple, Set)):
        return list(value)
    if isinstance(value, (Tensor, str, bytes, type, types.ModuleType)) or depth > 2:
        return []
    return list(getattr(value, "__dict__", {}).values())


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet assigned
        return None


class Rebound:
    """Which of the variables that a function reads from the functions around it was assigned again since.

    A loop that makes a function at each round changes what the earlier ones read. Variables that the function itself
    assigns, such as a count of its calls, are left out.
    """

    def __init__(self, function: Any) -> None:
        self._cells: list[tuple[str, types.CellType, Callable[[], Any]]] = []
        while isinstance(function, (functools.partial, types.MethodType)):
            function = function.func if isinstance(function, functools.partial) else function.__func__
        if isinstance(function, types.FunctionType) and function.__closure__:
            own = _assigned(function.__code__)
            self._cells = [
                (name, cell, _held(_content(cell)))
                for name, cell in zip(function.__code__.co_freevars, function.__closure__, strict=True)
                if name not in own
            ]

    def name(self) -> str | None:
        """One of them; None where there are none."""
        return next((name for name, cell, before in self._cells if _other(_content(cell), before())), None)


def _held(value: Any) -> Callable[[], Any]:
    """A value, of a tensor a weak reference."""
    return weakref.ref(value) if isinstance(value, Tensor) else lambda: value


def _other(now: Any, before: Any) -> bool:
    numbers = isinstance(now, (int, float, complex, str)) and type(now) is type(before)
    return now is not before and not (numbers and now == before)


@functools.lru_cache(maxsize=10_000)
def _assigned(code: types.CodeType) -> set[str]:
    """The variables of functions around it that a function assigns."""
    found = {each.argval for each in dis.get_instructions(code) if each.opname in ("STORE_DEREF", "DELETE_DEREF")}
    return found.union(*(_assigned(each) for each in code.co_consts if isinstance(each, types.CodeType)))


def hides_graph(leaves: Sequence[Any]) -> bool:
    """Whether among the leaves of a tree there is an object with a tensor in it that requires grad."""
    odd = [leaf for leaf in leaves if not isinstance(leaf, (Tensor, int, float, complex, str, bytes, types.NoneType))]
    return any(tensor.requires_grad for leaf in odd for tensor in reachable(leaf, Tensor))


def name_of(function: Any) -> str:
    """What to call a function in a message."""
    return getattr(function, "__name__", type(function).__name__)


def refuse(function: Any) -> None:
    """Raise ValueError if the function cannot be a block: a part of it was given to torch.compile, or it has a random
    generator of its own, whose numbers are not replayed.
    """
    for value in reachable(function, (nn.Module, types.FunctionType, torch.Generator)):
        if isinstance(value, torch.Generator):
            raise ValueError(
                f"the block {name_of(function)} has a torch.Generator, whose numbers would be others each time the "
                f"block is run; draw from torch's global generator, or give the numbers to the block as an argument"
            )
        inside = value._modules if isinstance(value, nn.Module) else vars(value)
        if {"_orig_mod", "_torchdynamo_orig_callable"} & inside.keys() or vars(value).get("_compiled_call_impl"):
            raise ValueError(
                f"the block {name_of(function)} was given to torch.compile, whose gradient has no second derivative; "
                f"write the block with the module or function that was given to it"
            )
