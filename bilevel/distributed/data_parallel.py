"""data_parallel(): the examples of the inner and outer batches split over ranks."""

from collections.abc import Callable
from typing import Any

from bilevel.engine.split import over, split_over
from bilevel.problem import Problem
from bilevel.space.ranks import Ranks


def data_parallel(
    problem: Problem, ranks: Ranks, count: Callable[[Any], int] | None = None, *, check: bool = True
) -> Problem:
    """The same problem, with each rank's batches holding a part of the examples.

    The losses must be means over the examples of a batch (plus what does not depend on them). Then a loss, a gradient
    and a product with a second derivative over all examples are the means of the ranks', weighted by their numbers of
    examples, and that is what every solver, estimator and status sees: N ranks give the hypergradient of one process
    with the whole batch, to rounding, and the same bits on every rank. Parts may differ in size, and be empty.

    Per oracle call: one all-reduce of a number for a loss; for a gradient one of P numbers more; for a product with a
    second derivative another one, of P in y and Q in x; a rank's Q numbers for df/dx also where f does not use x. A
    hypergradient adds two of a few numbers, which see that x, y, the state, the solver and the estimator are the same
    on every rank, and the answer too. Each loss waits for the device once, to learn whether a rank failed.

    - A rank whose loss raises: all raise `RankError`, which names it; so they do where its data end or fail in
      `iterate` or `OuterLoop`. A rank that dies, or raises in a backward or in a start, is told by torch: the group's
      connection breaks or its time-out ends; torchrun ends all.
    - Random numbers: what an estimator draws is the same on every rank, whatever the ranks' seeds. What a loss draws
      (dropout) is each rank's own, so N ranks equal one in distribution.
    - Problem.init must do without the batch; one that looks at it is refused.
    - Problem.features: each rank makes those of its rows; they must not mix rows.
    - Closed forms, residuals, GaussNewton's outputs look at the batch elsewhere than in a loss, and are refused when
      they do. bilevel.Compiled and bilevel.solution are refused.

    Args:
        problem: with losses that are means.
        ranks: the processes.
        count: how many examples a rank's batch holds; under `TaskMean` it is given one task's batch. None: the leading
            dimension of the batch's tensors, which must agree. Of a mean over tokens or over a mask it is how many of
            them there are: `lambda batch: int(batch["mask"].sum())`. It is taken at its word.
        check: hold each loss, at its first batch, against its values on parts: two halves of a rank's rows, and rows of
            two ranks, beside the given x and y (there too much looks like a mean where y is 0). Where it is no mean (a
            sum, a mean by class weights or by a mask, batch normalization, weights by place and not by index), that is
            an error; in half precision from a difference of 5 % on, where the loss cannot be had in float32. It costs
            some calls of each loss once, copies of y and x, and a gather of 4 rows a rank; meters do not see it. It
            cannot look at random losses, at later batches, and at batches of other kinds than tensors with one leading
            dimension.

    Returns:
        The problem for `hypergradient`, `iterate` and `adapt`. Make it once: it remembers what was learned about it.

    Raises:
        ValueError: the data of the problem are split already; (when used) a loss is no mean, the arguments differ
            between ranks, or a number of examples cannot be found.

    Example:
        >>> import torch, torch.distributed as dist, bilevel as bl
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun does it for you
        >>> ranks = bl.distributed.Ranks()
        >>> problem = bl.Problem(lambda y, x, b: (y - x * b).square().mean(), lambda y, x, b: (y - b).square().mean())
        >>> split = bl.distributed.data_parallel(problem, ranks)
        >>> batches = bl.distributed.split(bl.Batches(torch.arange(8.0), torch.ones(4)), ranks)
        >>> bl.hypergradient(split, torch.tensor(1.0), torch.tensor(0.0), batches,
        ...     solver=bl.Descent(bl.SGD(lr=0.5), steps=1), estimator=bl.Unrolled()).grad
        tensor(17.5000)
        >>> dist.destroy_process_group()
    """
    if not isinstance(problem, Problem) or not isinstance(ranks, Ranks):
        raise TypeError(
            f"data_parallel() was given a {type(problem).__name__} and a {type(ranks).__name__}; a bilevel.Problem and "
            f"bilevel.distributed.Ranks() were needed"
        )
    if split_over(problem) is not None:
        raise ValueError("data_parallel() was given a problem whose data are split already")
    if count is not None and not callable(count):
        raise TypeError(f"data_parallel() was given count={count!r}; a function of a batch was needed")
    return over(problem, ranks, count, check=check)
