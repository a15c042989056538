"""Which layers adapt, as masks: the cheapest mask whose loss of accuracy is allowed.

    pattern m in {0, 1}^L over groups of parameters       y: the groups with m_l = 1, the others stay where they are
    after ordinary meta-training, on validation tasks:   argmin of cost(m)   with score(m) >= score(1...1) - threshold

| of L like layers, the last j adapt | per inner step |
| --- | --- |
| forward | L; where the layers below are run once a task (`Learner.reuse_features`), j |
| backward | j products with weights, j - 1 with inputs: it stops at the shallowest layer that adapts |
| activations kept | j of L |

A hole in the middle saves its products with weights alone. ANIL is the pattern of the last layer. The mask may also be
used at meta-training: `pattern.applied(learner)` is a learner like any other.

Reference: Khabarlak, Faster Optimization-Based Meta-Learning Adaptation Phase, arXiv 2206.05930; known to us by its
abstract alone, so the candidates and the search are our reading. It differs by counting work in place of time: a count
is the same on every run, and ranks close patterns rightly on a machine that others use, too.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bilevel.adapt import adapt
from bilevel.batches import Batches
from bilevel.meta.evaluation import Evaluation, accuracy
from bilevel.meta.head import Head
from bilevel.meta.learner import Learner, Outer
from bilevel.space import tree

Groups = Mapping[str, tuple[str, ...]]
"""The names of the parameters of each group, by the group's name, from the input to the output."""
_MANY = 12


def groups(module: nn.Module, *, split: bool = False) -> dict[str, tuple[str, ...]]:
    """The parameters that require grad, grouped by the layer that holds them.

    Args:
        module: its layers are taken in the order in which they were registered.
        split: a group for each parameter, so that weight and bias are told apart.

    Raises:
        ValueError: no parameter requires grad.

    Example:
        >>> groups(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)))
        {'0': ('0.weight', '0.bias'), '2': ('2.weight', '2.bias')}
    """
    found = dict[str, tuple[str, ...]]()
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            group = name if split else name.rpartition(".")[0] or name
            found[group] = (*found.get(group, ()), name)
    if not found:
        raise ValueError("groups() was given a module none of whose parameters requires grad, so nothing could adapt")
    return found


@dataclasses.dataclass(frozen=True, eq=False)
class Pattern:
    """Which groups of parameters adapt.

    Args:
        groups: as from `groups(module)`.
        mask: a string of 0 and 1, or numbers or booleans, one for each group.

    Raises:
        ValueError: the mask has another length, holds something else than 0 and 1, or lets nothing adapt.

    Example:
        >>> layers = groups(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)))
        >>> Pattern(layers, "01").parameters
        ('2.weight', '2.bias')
    """

    groups: Groups
    mask: Sequence[bool] | str

    def __post_init__(self) -> None:
        given = list(self.mask)
        if len(given) != len(self.groups) or any(bit not in (0, 1, "0", "1") for bit in given):
            raise ValueError(
                f"Pattern was given mask={self.mask!r}; a 0 or 1 for each of the {len(self.groups)} groups "
                f"{list(self.groups)} was needed"
            )
        object.__setattr__(self, "mask", tuple(bit in (1, "1") for bit in given))
        if not any(self.mask):
            raise ValueError(
                f"Pattern was given mask={str(self)!r}, in which nothing adapts; a 1 was needed for at least one of "
                f"the groups {list(self.groups)}"
            )

    def __str__(self) -> str:
        return "".join("1" if bit else "0" for bit in self.mask)

    @property
    def full(self) -> bool:
        """Whether everything adapts."""
        return all(self.mask)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the parameters that adapt."""
        chosen = (names for names, bit in zip(self.groups.values(), self.mask, strict=True) if bit)
        return tuple(itertools.chain.from_iterable(chosen))

    def applied(self, learner: Learner) -> Learner:
        """The learner in which these parameters adapt, whose x is that of `learner`. All of them: ordinary MAML.

        Raises:
            ValueError: the learner's x would be another: with a head, a fixed start or learned rates, or where the
                groups are those of another module.
        """
        if isinstance(learner.adapts, Head) or learner.rates is not None or not learner.start.learned:
            raise ValueError(
                f"Pattern needs a learner whose x is the start of all parameters; one with adapts={learner.adapts!r}, "
                f"rates={learner.rates!r} and start={learner.start!r} was given. Write Learner(module, loss, "
                f"solver=...)"
            )
        free = {name for name, parameter in learner.module.named_parameters() if parameter.requires_grad}
        grouped = set(itertools.chain.from_iterable(self.groups.values()))
        if free != grouped:
            raise ValueError(
                f"Pattern was given groups of the parameters {sorted(grouped)}, where those of the learner's module "
                f"are {sorted(free)}. Write groups(learner.module)"
            )
        return dataclasses.replace(learner, adapts=True if self.full else self.parameters)


def suffixes(groups: Groups) -> list[Pattern]:
    """The last 1, 2, ..., L groups: L patterns, the cheapest of each depth.

    Example:
        >>> [str(pattern) for pattern in suffixes({"a": ("a",), "b": ("b",), "c": ("c",)})]
        ['001', '011', '111']
    """
    count = len(groups)
    return [Pattern(groups, "0" * (count - size) + "1" * size) for size in range(1, count + 1)]


def contiguous(groups: Groups) -> list[Pattern]:
    """All runs of neighbors: L (L + 1) / 2 patterns.

    Example:
        >>> [str(pattern) for pattern in contiguous({"a": ("a",), "b": ("b",)})]
        ['01', '10', '11']
    """
    count = len(groups)
    runs = [(size, low) for size in range(1, count + 1) for low in reversed(range(count - size + 1))]
    return [Pattern(groups, "0" * low + "1" * size + "0" * (count - size - low)) for size, low in runs]


def every(groups: Groups) -> list[Pattern]:
    """All 2^L - 1 patterns.

    Raises:
        ValueError: there are more than 12 groups.

    Example:
        >>> len(every({"a": ("a",), "b": ("b",), "c": ("c",)}))
        7
    """
    if len(groups) > _MANY:
        raise ValueError(
            f"every() was given {len(groups)} groups, which have {2 ** len(groups) - 1} patterns; at most {_MANY} "
            f"groups were needed. Use suffixes() or contiguous(), or join groups"
        )
    masks = sorted(itertools.product((False, True), repeat=len(groups)), key=lambda mask: (sum(mask), mask))
    return [Pattern(groups, mask) for mask in masks if any(mask)]


def work(run: Callable[[], object]) -> int:
    """Count what a function computes: floating-point operations of matrix products, convolutions and attention, and one
    for each number that another operator writes (views write none).

    The same number on every run and machine; it says nothing about how fast small operators are.

    Example:
        >>> import torch
        >>> a = torch.ones(2, 3)
        >>> work(lambda: (a @ a.T).tanh())  # 2 * 2 * 3 * 2 for the product, 4 for tanh
        28
    """
    with _Work() as counted:
        run()
    return counted.total


class _Work(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        known = flop_registry.get(func._overloadpacket)
        if known is not None:
            self.total += known(*args, **(kwargs or {}), out_val=found)
        elif not func.is_view and func._overloadpacket is not torch.ops.aten._unsafe_view:
            self.total += sum(leaf.numel() for leaf in tree.tensors(found) if isinstance(leaf, Tensor))
        return found


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a pattern is worth.

    Attributes:
        pattern: which groups adapt.
        evaluation: its scores on the validation tasks.
        cost: of an adaptation to the tasks of the first batch.
        difference: mean over tasks of its score less that of the full pattern on the same task.
        interval: half the width of the 95 % interval of that difference.
    """

    pattern: Pattern
    evaluation: Evaluation
    cost: float
    difference: float
    interval: float


@dataclasses.dataclass(frozen=True)
class Choice:
    """What `search` found.

    Attributes:
        pattern: the cheapest of those that lose at most the threshold.
        measured: all candidates, the full pattern among them, in the order of their cost.
        threshold: what was allowed.
    """

    pattern: Pattern
    measured: tuple[Measured, ...]
    threshold: float

    def __str__(self) -> str:
        lines = [
            f"{'*' if each.pattern is self.pattern else ' '} {each.pattern}  score {each.evaluation.score:.4f} +- "
            f"{each.evaluation.interval:.4f}  against all {each.difference:+.4f} +- {each.interval:.4f}  cost "
            f"{each.cost:.4g}"
            for each in self.measured
        ]
        return "\n".join(lines)


def search(
    learner: Learner,
    outer: Outer,
    batches: Iterable[Batches],
    *,
    threshold: float,
    candidates: Sequence[Pattern] | None = None,
    score: Callable[[Any, Any], Any] = accuracy,
    cost: Callable[[Callable[[], object]], float] = work,
) -> Choice:
    """Choose which layers adapt, after ordinary meta-training.

    Costs, per candidate, one adaptation and one prediction for each task, and one more adaptation to the first batch,
    whose cost is taken. All candidates see the same tasks.

    Args:
        learner: a trained one in which parameters adapt.
        outer: its x.
        batches: validation tasks, `Batches(inner=support, outer=query)` with a leading task dimension; two tasks or
            more in all. Read once and kept.
        threshold: the loss of mean score that is allowed, at least 0.
        candidates: patterns to try besides the full one; None for `suffixes(groups(learner.module))`.
        score: larger is better, as for `Learner.evaluate`; of a loss pass its negative.
        cost: called with a function that adapts; returns what that cost. By default its counted `work`. A stopwatch
            makes the choice depend on what else runs on the machine.

    Returns:
        The chosen pattern, and what all candidates are worth. Ties in cost go to the better score.

    Raises:
        ValueError: threshold is negative, there are no batches, or no candidates, or the score is not finite where
            everything adapts; see `Pattern.applied`.

    Example:
        >>> import torch, bilevel as bl
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> maml = bl.meta.Learner(net, nn.functional.cross_entropy)
        >>> support = torch.randn(4, 6, 2), torch.arange(6).remainder(3).expand(4, 6)
        >>> found = search(maml, maml.outer(), [bl.Batches(inner=support, outer=support)], threshold=1.0)
        >>> str(found.pattern), found.pattern.applied(maml).adapts
        ('01', ('2.weight', '2.bias'))
    """
    if not isinstance(threshold, (int, float)) or not threshold >= 0:
        raise ValueError(f"search() was given threshold={threshold!r}; a number of at least 0 was needed")
    tasks = list(batches)
    if not tasks:
        raise ValueError("search() was given no batches; validation tasks were needed, two or more")
    tried = suffixes(groups(learner.module)) if candidates is None else list(candidates)
    if not tried:
        raise ValueError("search() was given no candidates; pass suffixes(groups(learner.module)), say")
    if not any(pattern.full for pattern in tried):
        tried.append(Pattern(tried[0].groups, "1" * len(tried[0].groups)))
    found = []
    for pattern in tried:
        masked = pattern.applied(learner)
        evaluation = masked.evaluate(outer, tasks, score=score)
        found.append((pattern, evaluation, float(cost(_adapting(masked, outer, tasks[0])))))
    reference = next(evaluation for pattern, evaluation, _ in found if pattern.full)
    if not math.isfinite(reference.score):
        raise ValueError(
            f"search() found the score {reference.score} where everything adapts ({reference.status.name}), which "
            f"nothing can be held against. Lower the step size of the learner's solver"
        )
    measured = [
        Measured(pattern, evaluation, price, *_paired(evaluation, reference)) for pattern, evaluation, price in found
    ]
    measured.sort(key=lambda each: (each.cost, -each.evaluation.score))
    chosen = next(each for each in measured if each.evaluation.score >= reference.score - threshold)
    return Choice(chosen.pattern, tuple(measured), threshold)


def _adapting(learner: Learner, outer: Outer, batches: Batches) -> Callable[[], object]:
    x = tree.detach(outer)
    return lambda: adapt(
        learner.problem,
        x,
        None,
        batches,
        solver=learner.inner_solver,
        tasks=True,
        chunk=learner.chunk,
        evaluate=False,
    )


def _paired(one: Evaluation, other: Evaluation) -> tuple[float, float]:
    """The mean difference over the same tasks, and half the width of its interval."""
    apart = Evaluation.of([a - b for a, b in zip(one.scores, other.scores, strict=True)], [0.0] * one.tasks)
    return apart.score, apart.interval
