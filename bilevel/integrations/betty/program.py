"""Two problems of a Betty program as one bilevel problem: the loss of the lower as a function of both their parameters.

    g(y, x, batch) = lower.training_step(batch) with y in the place of the lower problem's parameters and x in that of
                     the other's;          f(y, v) = <v, y - y_now>, whose hypergradient is (dy*/dx)^T v

Betty's problems read their parameters from their modules, so the tensors are put into the modules for the time of a
call. A loss that does not see them there (it holds on to a parameter object, or asks for its type) is refused.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import bilevel as bl
from bilevel.engine import autodiff
from bilevel.integrations.betty.below import all_below, following, lower_of, rival
from bilevel.integrations.betty.modules import Modules, as_leaf, dense, leaves_behind, no_statistics, norm
from bilevel.integrations.betty.optimizer import Named

_SINGLE = {"default", "cpu", "gpu", None}
_STUCK = 0.5
"""How much of the dependence may be left when what lies below has followed."""


@dataclasses.dataclass(frozen=True)
class Program:
    """The lower problem `curr` and the one whose parameters it depends on, `prev`.

    Attributes:
        inner: the lower problem's parameters now, by name.
        outer: the other problem's, likewise.
        wanted: names of the inner parameters that Betty's vector is of, one for each of its tensors.
        given: names of the outer parameters, one for each tensor that Betty waits for.
        lower: the parameters of all that lies below `curr`, by problem.
        rest: those of these problems that require grad and are not trained.
        below: how that follows; 0 to take it as fixed.
        call: a problem's loss with tensors in the places of parameters, by name.
        known: the modules of all problems of the program.
    """

    curr: Any
    prev: Any
    inner: Named
    outer: Named
    wanted: Sequence[str]
    given: Sequence[str]
    lower: Sequence[tuple[Any, Named]]
    rest: Named
    below: int | bl.Descent
    call: Callable[..., Tensor]
    known: nn.Module

    def loss(self, inner: Named, outer: Named, batch: Any) -> Tensor:
        """The lower problem's loss at these parameters, after the problems below it have followed."""
        # As in the program that Betty runs, a loss sees parameters that require grad, also without a derivative.
        tensors = {name: as_leaf(leaf) for name, leaf in {**self.rest, **self.fixed(), **inner, **outer}.items()}
        return self._total(self.curr, tensors, batch, graph=torch.is_grad_enabled())

    def paired(self, vector: Sequence[Tensor]) -> Named:
        """Betty's vector by the names of the inner parameters; zero for those that it leaves out.

        Raises:
            ValueError: it is not one tensor for each parameter.
        """
        needed = [tuple(self.inner[name].shape) for name in self.wanted]
        if [tuple(leaf.shape) for leaf in vector] != needed:
            raise ValueError(
                f"problem {self.curr.name} was handed a vector of shapes {[tuple(leaf.shape) for leaf in vector]}; one "
                f"tensor for each of its parameters was needed, {needed}"
            )
        found = dict(zip(self.wanted, map(dense, vector), strict=True))
        return {name: found.get(name, torch.zeros_like(leaf)).detach() for name, leaf in self.inner.items()}

    def follow_up(self) -> dict[str, float]:
        """How what lies below followed, for the log; nothing where nothing follows.

        `below_left`: how much of it depends on `curr` after it has followed, as a part of what did before: the norm of
        d/dy <its stationarity, u> for a random u, at b_K(y) over that at b fixed, the largest of the problems.
        `below_moved`: how far it went from where it is, as a part of its size.

        Raises:
            ValueError: more than half of the dependence is left.
        """
        if not self.below:
            return {}
        y = {name: leaf.detach().requires_grad_() for name, leaf in self.inner.items()}
        here = {name: as_leaf(leaf) for name, leaf in {**self.rest, **self.fixed(), **y, **self.outer}.items()}
        with torch.enable_grad():
            ends = self._followed(self.curr, here, graph=True)
            parts = [self._left(each, y, here, {**here, **ends}) for each in lower_of(self.curr)]
        if not max(parts) <= _STUCK:
            raise ValueError(
                f"problem {self.curr.name}: what lies below it does not follow in {self.below}: {max(parts):.0%} of "
                f"its gradient's dependence is left. Give it more steps, or a larger step size: "
                f"below=bilevel.Descent(bilevel.SGD(lr=0.1), 100)"
            )
        way = norm([leaf.detach() - here[name].detach() for name, leaf in ends.items()])
        size = norm([here[name].detach() for name in ends])
        return {"below_left": max(parts), "below_moved": way / size if size else way}

    def _left(self, problem: Any, y: Named, before: Named, after: Named) -> float:
        own, generator = self._names_of(problem), torch.Generator().manual_seed(0)
        u = {name: torch.randn(leaf.shape, generator=generator).to(leaf) for name, leaf in own.items()}
        whole = self._slope(problem, y, u, before)
        return self._slope(problem, y, u, after) / whole if whole else 0.0

    def _slope(self, problem: Any, y: Named, u: Named, tensors: Named) -> float:
        """The norm of d/dy <stationarity of the problem, u>."""
        b = {name: tensors[name] for name in u}
        loss = self._total(problem, tensors, problem.cur_batch, graph=True)
        gradient = dict(zip(b, autodiff.grad([loss], list(b.values()), create_graph=True), strict=True))
        optimizer, _ = following(problem, self._names_of(problem), self.below)
        rest = optimizer.stationarity(gradient, b, self.outer)
        pairs = [(rest[name], u[name]) for name in b if rest is not None and rest[name] is not None]
        found = autodiff.grad([g for g, _ in pairs], list(y.values()), [v for _, v in pairs], retain_graph=True)
        return norm([leaf for leaf in found if leaf is not None])

    def require_dependence(self, batches: Sequence[Any]) -> None:
        """Raise ValueError unless the loss uses some of the outer parameters on some of the batches."""
        for batch in batches:
            outer = {name: leaf.detach().requires_grad_() for name, leaf in self.outer.items()}
            inner = {name: leaf.detach().requires_grad_() for name, leaf in self.inner.items()}
            wanted = {id(leaf) for leaf in outer.values()}
            with torch.enable_grad():
                if any(id(leaf) in wanted for leaf in leaves_behind(self.loss(inner, outer, batch))):
                    return
        raise ValueError(
            f"training_step of problem {self.curr.name} does not use the parameters of problem {self.prev.name}, so "
            f"the gradient of this path is zero. Is an edge of the dependencies one too many, or is it used as .data, "
            f"detached, or under torch.no_grad()?"
        )

    def fixed(self) -> Named:
        """What lies below, where it is."""
        return {name: leaf for _, each in self.lower for name, leaf in each.items()}

    def _names_of(self, problem: Any) -> Named:
        return next(each for owner, each in self.lower if owner is problem)

    def _total(self, problem: Any, tensors: Named, batch: Any, *, graph: bool) -> Tensor:
        """A problem's loss after what lies below it has followed."""
        if self.below:
            tensors = {**tensors, **self._followed(problem, tensors, graph=graph)}
        with no_statistics(self.known):
            return self.call(tensors, problem, batch)

    def _followed(self, problem: Any, tensors: Named, *, graph: bool) -> Named:
        """The parameters of what lies below after its steps from where it is, each problem on its own batch."""
        moved: Named = {}
        for low in lower_of(problem):
            own = self._names_of(low)
            optimizer, steps = following(low, own, self.below)
            y: Named = {name: leaf.detach() for name, leaf in own.items()}
            state = optimizer.init(y)
            for _ in range(steps):
                with torch.enable_grad():
                    y = {name: as_leaf(leaf) for name, leaf in y.items()}
                    loss = self._total(low, {**tensors, **moved, **y}, low.cur_batch, graph=True)
                    found = autodiff.grad([loss], list(y.values()), create_graph=graph)
                    y, state = optimizer.step(dict(zip(y, found, strict=True)), state, y, self.outer)
                if not graph:
                    y = {name: leaf.detach() for name, leaf in y.items()}
            moved |= {name: as_leaf(leaf) for name, leaf in y.items()}
        return moved


def program(curr: Any, prev: Any, *, below: int | bl.Descent | None, whole: bool) -> Program:
    """The two problems of a call of a hypergradient hook.

    Args:
        curr: the lower problem.
        prev: the problem whose parameters the result is for.
        below: how what lies below `curr` follows it: a number of steps of its own optimizer, or an optimizer with that
            number; 0 holds it fixed; None: there must be nothing.
        whole: whether all that `curr` trains is the inner variable, not only what Betty's vector is of.

    Raises:
        ValueError: the two cannot be differentiated; the message says why and what to write.
    """
    for problem in (curr, prev):
        _refuse_processes(problem)
    refuse_shared(curr, prev)
    lower = all_below(curr)
    if lower and below is None:
        raise ValueError(
            f"problem {curr.name} is itself above {', '.join(each.name for each in lower)}: its gradient has a part "
            f"through what lies below, and so has its Hessian, which its training_step alone does not show. Write "
            f"below=K, to let what lies below follow for K steps of its optimizer (exact as K grows), or below=0, to "
            f"take it as fixed, as Betty's darts does"
        )
    if below and any(each is prev for each in lower):
        raise ValueError(
            f"problem {prev.name} lies below {curr.name}, and the gradient for its own parameters was asked for while "
            f"it follows {curr.name}: the two answer together, and Betty's paths, which take one answer after the "
            f"other, cannot say that. No edges do; let {curr.name} and {prev.name} be one problem"
        )
    if below and (other := rival(curr, _known(curr))) is not None:
        raise ValueError(
            f"problems {curr.name} and {other.name} answer each other through what lies below both, which Betty's "
            f"paths cannot say. Write below=0, to take what lies below as fixed"
        )
    lower = [each for each in lower if each is not prev]
    involved = [curr, prev, *lower]
    modules = Modules(involved)
    known = nn.ModuleList([each.module for each in (*involved, *_known(curr)) if isinstance(each.module, nn.Module)])
    names = {id(leaf): name for name, leaf in modules.named_parameters()}
    wanted = _names(curr, getattr(curr, "meta_trainable_parameters", curr.trainable_parameters)(), names)
    if len(set(wanted)) < len(wanted):
        raise ValueError(
            f"problem {curr.name} names a trainable parameter twice; each was needed once, as in "
            f"list(self.module.parameters())"
        )
    given = _names(prev, prev.trainable_parameters(), names)
    by_name: Named = dict(modules.named_parameters())
    inner = {name: by_name[name] for name in (_names(curr, curr.trainable_parameters(), names) if whole else wanted)}
    outer = {name: by_name[name] for name in given}
    own = [(each, {n: by_name[n] for n in _names(each, each.trainable_parameters(), names)}) for each in lower]
    trained = {*inner, *outer, *(name for _, leaves in own for name in leaves)}
    rest = {name: leaf for name, leaf in by_name.items() if leaf.requires_grad and name not in trained}
    with no_statistics(known):
        call, _ = bl.functional(modules, trainable={*trained, *rest}, requires_grad=False)
    return Program(curr, prev, inner, outer, wanted, given, own, rest, below or 0, call, known)


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


def _names(problem: Any, parameters: Sequence[Tensor], names: Mapping[int, str]) -> list[str]:
    parameters = list(parameters)
    unknown = [tuple(leaf.shape) for leaf in parameters if id(leaf) not in names]
    if unknown:
        raise ValueError(
            f"problem {problem.name} has {len(unknown)} trainable parameters (of shapes {unknown[:3]}) that are none "
            f"of its module's, as those of an IterativeProblem are; write it as an ImplicitProblem, whose module holds "
            f"what is trained"
        )
    if not parameters:
        raise ValueError(f"problem {problem.name} has no trainable parameters; its module was to hold at least one")
    return [names[id(leaf)] for leaf in parameters]


def _known(problem: Any) -> list[Any]:
    """All problems of the program: each is an attribute of the others (in 0.1.1 of those that it has edges to)."""
    found: list[Any] = []
    waiting = [problem]
    while waiting:
        each = waiting.pop()
        if not any(each is other for other in found):
            found.append(each)
            theirs = [value for value in vars(each).values() if hasattr(value, "training_step_exec")]
            waiting += [*theirs, *each.parents, *each.children]
    return found


def _refuse_processes(problem: Any) -> None:
    strategy = getattr(problem, "_strategy", None)
    if strategy not in _SINGLE or (getattr(problem, "_world_size", 0) or 0) > 1:
        raise ValueError(
            f'problem {problem.name} runs with strategy="{strategy}", over several processes, whose gradients are not '
            f'averaged here. Use EngineConfig(strategy="default"), or Betty\'s own types'
        )
