"""What lies below a problem of a Betty program, and how it follows when the problem moves.

    b_{k+1} = b_k - a dL_b/db(b_k, y, x),   k < K;       g(y, x) = L(y, b_K(y, x), x)

A problem that is itself above others has a gradient with a part through them. Here they follow it for K steps from
where they are, each with what lies below it in turn, and the derivative goes through their steps: exact as K grows.
"""

from typing import Any

import bilevel as bl
from bilevel.integrations.betty.movers import other_movers
from bilevel.integrations.betty.optimizer import Named, require_decay, steps_as


def lower_of(problem: Any) -> list[Any]:
    """The problems on the paths of a problem's gradient, each after those that it depends on."""
    waiting: list[Any] = []
    for path in problem.paths:
        waiting += [each for each in path[1:-1] if each is not problem and not _among(each, waiting)]
    found: list[Any] = []
    while waiting:
        free = [each for each in waiting if not any(_lies_below(other, each) for other in waiting)]
        found += free
        waiting = [each for each in waiting if not _among(each, free)]
    return found


def all_below(problem: Any) -> list[Any]:
    """Likewise, and what lies below those."""
    found: list[Any] = []
    for each in lower_of(problem):
        found += [other for other in (*all_below(each), each) if not _among(other, found)]
    return found


def following(problem: Any, parameters: Named, below: int | bl.Descent) -> tuple[bl.Optimizer, int]:
    """The optimizer with which a problem follows, and for how many steps.

    Raises:
        ValueError: its own steps cannot be followed.
    """
    if movers := other_movers(problem, parameters.values()):
        raise ValueError(
            f"problem {problem.name} lies below and is to follow, and it uses {', '.join(movers)}, so its steps are "
            f"more than its optimizer's. Leave it out, or write below=0, to take the problem as fixed"
        )
    if not isinstance(below, int):
        optimizer = below.optimizer
        assert isinstance(optimizer, bl.Optimizer)
        require_decay(problem.name, problem.optimizer, parameters, optimizer)
        return optimizer, below.steps
    optimizer = steps_as(problem.name, problem.optimizer, parameters)
    if not isinstance(optimizer, bl.SGD):
        raise ValueError(
            f"problem {problem.name} lies below and is to follow, and the steps of {type(optimizer).__name__} from "
            f"where it is have no derivative that settles. Write below=bilevel.Descent(bilevel.SGD(lr=0.1), {below}), "
            f"with its weight decay, or below=0, to take the problem as fixed"
        )
    return optimizer, below


def rival(curr: Any, known: list[Any]) -> Any | None:
    """A problem beside `curr` that the same lower problem follows, so that the two answer each other through it."""
    above: list[Any] = []
    waiting = list(curr.parents)
    while waiting:
        each = waiting.pop()
        above += [] if _among(each, above) else [each]
        waiting += each.parents
    lower = all_below(curr)
    beside = [each for each in known if each is not curr and not _among(each, above) and not _among(each, lower)]
    return next((each for each in beside if any(_among(low, lower) for low in all_below(each))), None)


def _lies_below(one: Any, other: Any) -> bool:
    """Whether a problem lies below another, on edges from lower to upper."""
    return any(child is one or _lies_below(one, child) for child in other.children)


def _among(problem: Any, problems: list[Any]) -> bool:
    return any(problem is each for each in problems)
