"""Two problems of a Betty program as one bilevel problem: the loss of the lower as a function of both their parameters.

    g(y, x, batch) = lower.training_step(batch) with y in the place of the lower problem's parameters and x in that of
                     the other's;          f(y, v) = <v, y - y_now>, whose hypergradient is (dy*/dx)^T v

Betty's problems read their parameters from their modules, so the tensors are put into the modules for the time of a
call. A loss that holds on to a parameter object would not see them, and is refused.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import bilevel as bl
from bilevel.engine import autodiff
from bilevel.integrations.betty.optimizer import steps_as

Named = dict[str, Tensor]
_SINGLE = {"default", "cpu", "gpu", None}


class _Modules(nn.Module):
    """The modules of all problems, so that the parameters of any can be exchanged while one computes its loss."""

    def __init__(self, problems: Sequence[Any]) -> None:
        super().__init__()
        for problem in problems:
            # (Names are for messages; a module's name may hold anything but a dot.)
            self.add_module(f"problem {problem.name}".replace(".", "_"), problem.module)

    def forward(self, problem: Any, batch: Any) -> Tensor:
        loss = problem.training_step_exec(batch)
        return loss["loss"] if isinstance(loss, dict) else loss


@dataclasses.dataclass(frozen=True)
class Program:
    """The lower problem `curr` and the one whose parameters it depends on, `prev`.

    Attributes:
        inner: the lower problem's parameters now, by name.
        outer: the other problem's, likewise.
        below: the problems below `curr`, in the order in which they move.
    """

    curr: Any
    prev: Any
    inner: Named
    outer: Named
    below: Sequence[tuple[Any, Named]]
    steps_below: int
    modules: nn.Module
    call: Callable[..., Tensor]
    seen: list[bool] = dataclasses.field(default_factory=list)
    """Whether a loss of this call was looked at for parameters that it holds on to."""

    def loss(self, inner: Named, outer: Named, batch: Any) -> Tensor:
        """The lower problem's loss at these parameters, after the problems below it have followed."""
        loss = self._at({**inner, **outer, **self._followed(inner, outer)}, self.curr, batch)
        if loss.requires_grad and not self.seen:
            # Once: a later step's graph may hold all earlier ones.
            self.seen.append(True)
            self._refuse_held_parameters(loss)
        return loss

    def require_dependence(self, batches: Sequence[Any]) -> None:
        """Raise ValueError unless the loss uses some of the outer parameters on some of the batches."""
        for batch in batches:
            outer = {name: leaf.detach().requires_grad_() for name, leaf in self.outer.items()}
            inner = {name: leaf.detach().requires_grad_() for name, leaf in self.inner.items()}
            wanted = {id(leaf) for leaf in outer.values()}
            with torch.enable_grad():
                if any(id(leaf) in wanted for leaf in _leaves(self.loss(inner, outer, batch))):
                    return
        raise ValueError(
            f"training_step of problem {self.curr.name} does not use the parameters of problem {self.prev.name}, so "
            f"the gradient of this path is zero. Is an edge of the dependencies one too many, or is it used as .data, "
            f"detached, or under torch.no_grad()?"
        )

    def _at(self, tensors: Named, problem: Any, batch: Any) -> Tensor:
        with _no_statistics(self.modules):
            return self.call(tensors, problem, batch)

    def _followed(self, inner: Named, outer: Named) -> Named:
        """The parameters below after some steps from where they are, each problem on its own batch."""
        graph = torch.is_grad_enabled()
        moved = {name: leaf.detach() for _, each in self.below for name, leaf in each.items()}
        for problem, own in self.below if self.steps_below else ():
            optimizer = steps_as(problem.name, problem.optimizer, own)
            y: Named = {name: moved[name] for name in own}
            state = optimizer.init(y)
            for _ in range(self.steps_below):
                with torch.enable_grad():
                    y = {name: leaf if leaf.requires_grad else leaf.requires_grad_() for name, leaf in y.items()}
                    loss = self._at({**inner, **outer, **moved, **y}, problem, problem.cur_batch)
                    found = autodiff.grad([loss], list(y.values()), create_graph=graph)
                    y, state = optimizer.step(dict(zip(y, found, strict=True)), state, y, outer)
                if not graph:
                    y = {name: leaf.detach() for name, leaf in y.items()}
            moved |= y
        return moved

    def _refuse_held_parameters(self, loss: Tensor) -> None:
        originals = {id(leaf): name for name, leaf in {**self.inner, **self.outer}.items()}
        for leaf in _leaves(loss):
            if id(leaf) in originals:
                raise ValueError(
                    f"training_step of problem {self.curr.name} uses {originals[id(leaf)]} by an object that it holds "
                    f"on to (a list of parameters made earlier, a closure), so its derivative cannot be followed. Take "
                    f"parameters from the module in each call, such as self.module.parameters()"
                )


def program(curr: Any, prev: Any, *, steps_below: int | None) -> Program:
    """The two problems of a call of a hypergradient hook.

    Args:
        curr: the lower problem.
        prev: the problem whose parameters the result is for.
        steps_below: how many steps the problems below `curr` follow it; 0 holds them fixed; None: there must be none.

    Raises:
        ValueError: the two cannot be differentiated; the message says why and what to write.
    """
    for problem in (curr, prev):
        _refuse_processes(problem)
    refuse_shared(curr, prev)
    lower = _below(curr)
    if lower and steps_below is None:
        raise ValueError(
            f"problem {curr.name} is itself above {', '.join(each.name for each in lower)}: its gradient has a part "
            f"through what lies below, and so has its Hessian, which its training_step alone does not show. Write "
            f"below=K, to let what lies below follow for K steps of its optimizer (exact as K grows), or below=0, to "
            f"take it as fixed, as Betty's darts does"
        )
    if steps_below and any(each is prev for each in lower):
        raise ValueError(
            f"problem {prev.name} lies below {curr.name}, and the gradient for its own parameters was asked for while "
            f"it follows {curr.name}. Write below=0, or take its edges out of one of the paths"
        )
    lower = [each for each in lower if each is not prev]
    others = [each for each in _known(curr) if each not in (curr, prev, *lower)]
    modules = _Modules([curr, prev, *lower, *others])
    names = {id(leaf): name for name, leaf in modules.named_parameters()}
    meta = getattr(curr, "meta_trainable_parameters", curr.trainable_parameters)
    inner = _named(curr, meta(), names)
    outer = _named(prev, prev.trainable_parameters(), names)
    below = [(each, _named(each, each.trainable_parameters(), names)) for each in lower]
    wanted = [*inner, *outer, *(name for _, leaves in below for name in leaves)]
    with _no_statistics(modules):
        call, _ = bl.functional(modules, trainable=wanted, requires_grad=False)
    return Program(curr, prev, inner, outer, below, steps_below or 0, modules, call)


def refuse_shared(one: Any, other: Any) -> None:
    """Raise ValueError where two problems hold one parameter."""
    theirs = {id(leaf) for leaf in other.module.parameters()}
    shared = [name for name, leaf in one.module.named_parameters() if id(leaf) in theirs]
    if shared:
        raise ValueError(
            f"problems {one.name} and {other.name} share parameters ({', '.join(shared[:3])}"
            f"{', ...' if len(shared) > 3 else ''}): each level moves its own, so the derivative of one by the other "
            f"has no meaning. Give each problem a module of its own (copy.deepcopy), or take the shared part out of one"
        )


def paired(vector: Sequence[Tensor], program: Program) -> Named:
    """Betty's vector by the names of the parameters.

    Raises:
        ValueError: it is not one tensor for each parameter.
    """
    if [tuple(leaf.shape) for leaf in vector] != [tuple(leaf.shape) for leaf in program.inner.values()]:
        raise ValueError(
            f"problem {program.curr.name} was handed a vector of shapes {[tuple(leaf.shape) for leaf in vector]}; one "
            f"tensor for each of its parameters was needed, "
            f"{[tuple(leaf.shape) for leaf in program.inner.values()]}"
        )
    return dict(zip(program.inner, (leaf.detach() for leaf in vector), strict=True))


def _named(problem: Any, parameters: Sequence[Tensor], names: Mapping[int, str]) -> Named:
    unknown = [tuple(leaf.shape) for leaf in parameters if id(leaf) not in names]
    if unknown:
        raise ValueError(
            f"problem {problem.name} has {len(unknown)} trainable parameters (of shapes {unknown[:3]}) that are none "
            f"of its module's, as those of an IterativeProblem are; write it as an ImplicitProblem, whose module holds "
            f"what is trained"
        )
    if not parameters:
        raise ValueError(f"problem {problem.name} has no trainable parameters; its module was to hold at least one")
    return {names[id(leaf)]: leaf for leaf in parameters}


def _below(curr: Any) -> list[Any]:
    """What lies below a problem on its paths, the lowest first."""
    found: list[Any] = []
    for path in curr.paths:
        found += [each for each in reversed(path[1:-1]) if each not in found and each is not curr]
    return found


def _known(problem: Any) -> list[Any]:
    """All problems of the program: the engine makes each an attribute of the others."""
    found = [each for each in vars(problem).values() if hasattr(each, "training_step_exec") and hasattr(each, "module")]
    return [each for i, each in enumerate(found) if all(each is not other for other in found[:i])]


def _refuse_processes(problem: Any) -> None:
    strategy = getattr(problem, "_strategy", None)
    if strategy not in _SINGLE or (getattr(problem, "_world_size", 0) or 0) > 1:
        raise ValueError(
            f'problem {problem.name} runs with strategy="{strategy}", over several processes, whose gradients are not '
            f'averaged here. Use EngineConfig(strategy="default"), or Betty\'s own types'
        )


@contextlib.contextmanager
def _no_statistics(modules: nn.Module) -> Iterator[None]:
    """Normalization layers in training mode write no running statistics: what they normalize by does not change."""
    writing = [
        layer
        for layer in modules.modules()
        if isinstance(layer, nn.modules.batchnorm._NormBase) and layer.training and layer.track_running_stats
    ]
    for layer in writing:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer in writing:
            layer.track_running_stats = True


def _leaves(value: Tensor) -> Iterator[Tensor]:
    """The leaf tensors behind a tensor's graph."""
    seen, queue = set[object](), [value.grad_fn]
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            yield leaf
        queue += [following for following, _ in node.next_functions]
