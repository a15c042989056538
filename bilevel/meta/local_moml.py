"""LocalMOML: clients that take several steps of memory-based MAML by themselves, and are then averaged.

    each client i:  w_i = w;  u = w_i - a grad L_i(w_i; S0)
        H times:    u <- (1 - b) u + b (w_i - a grad L_i(w_i; S1));    w_i <- w_i - eta D_i
    w <- mean_i w_i

| | per client and local step | memory |
| --- | --- | --- |
| round | that of `MOML`, one task | that of one client, and one more w |

Reference: Wang, Yuan, Ying and Yang, arXiv 2106.04911, with the round of its released code. D_i is that of `MOML`:
form="plain" is the federated code, "released" that of the sine waves (times b), "paper" of second order.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bilevel.adapt import adapt
from bilevel.batches import Batches
from bilevel.engine.base import Engine
from bilevel.hypergradient import hypergradient
from bilevel.inner.base import InnerSolver
from bilevel.meta.moving_average import MovingAverage, Personal, check_blend
from bilevel.problem import Problem
from bilevel.space import tree
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class Round:
    """What a round of `LocalMOML` leaves.

    Attributes:
        outer: the mean of the clients' w_i, a tree like x, without a graph.
        clients: the w_i.
        models: the personal models u_i.
        outer_losses: f at u in each local step, of shape (H,) for each client.
    """

    outer: Tree
    clients: list[Tree]
    models: list[Tree]
    outer_losses: list[Tensor]


@dataclasses.dataclass(frozen=True)
class LocalMOML:
    """Rounds of local steps.

    Args:
        rate: eta, the step size of w_i, positive.
        blend: b, above 0 and at most 1.
        form: as for `MOML`.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> import torch, bilevel as bl
        >>> loss = lambda y, x, b: (y - b) ** 2 / 2
        >>> problem = bl.Problem(loss, loss, init=lambda x, b: x)
        >>> clients = [[bl.Batches(goal, goal)] * 2 for goal in (torch.tensor(0.0), torch.tensor(1.0))]
        >>> local = bl.meta.LocalMOML(rate=0.5, blend=0.5)
        >>> local.round(problem, torch.tensor(1.0), clients, solver=bl.Descent(bl.SGD(lr=0.1), steps=1)).outer
        tensor(0.6006)
    """

    rate: float
    blend: float = 0.5
    form: str = "plain"

    def __post_init__(self) -> None:
        check_blend("LocalMOML", self.blend, self.form)
        if not isinstance(self.rate, (int, float)) or isinstance(self.rate, bool) or not 0 < self.rate < float("inf"):
            raise ValueError(f"LocalMOML was given rate={self.rate!r}; a positive number was needed")

    def round(
        self,
        problem: Problem,
        outer: Tree,
        clients: Sequence[Sequence[Batches]],
        *,
        solver: InnerSolver,
        starts: Sequence[Any] | None = None,
        weights: Sequence[float] | None = None,
        engine: Engine | None = None,
    ) -> Round:
        """One round; x itself is not changed.

        Args:
            problem: that of one client, with `init`.
            outer: w.
            clients: the batches of the local steps of each, without a task dimension.
            solver: how a client adapts: the paper's is Descent(SGD(a), 1).
            starts: S0 of each client, an inner batch; None: u begins on the inner batch of the first local step.
            weights: of the clients in the mean, at least 0, for instance how many data each has; None for equal ones.
            engine: how derivatives are computed, as for `bilevel.hypergradient`; all clients share what it compiles.

        Raises:
            ValueError: no client, a client without a batch, as many `starts` or `weights` as there are no clients, or
                weights that are negative or all 0.
            BilevelError: a local hypergradient failed.
        """
        shares = self._shares(clients, starts, weights)
        if problem.init is None:
            raise ValueError("LocalMOML was given a problem without init; write init=lambda outer, batch: outer")
        done = [
            self._client(problem, outer, batches, solver, None if starts is None else (starts[place],), engine)
            for place, batches in enumerate(clients)
        ]
        total: list[Tensor] | None = None
        for share, (w, _, _) in zip(shares, done, strict=True):
            part = [share * leaf for leaf in tree.tensors(w)]
            total = part if total is None else [a + b for a, b in zip(total, part, strict=True)]
        assert total is not None, "there is a client"
        return Round(
            tree.like(outer, total), [w for w, _, _ in done], [u for _, u, _ in done], [losses for _, _, losses in done]
        )

    def _client(
        self,
        problem: Problem,
        outer: Tree,
        steps: Sequence[Batches],
        solver: InnerSolver,
        start: tuple[Any] | None,
        engine: Engine | None,
    ) -> tuple[Tree, Tree, Tensor]:
        w, state, losses = tree.tree_map(lambda leaf: leaf.detach().clone(), outer), None, []
        if start is not None:
            u = adapt(problem, w, None, Batches(start[0], None), solver=solver, evaluate=False, engine=engine)
            u.raise_if_failed()
            state = Personal(u.inner, torch.ones((), dtype=torch.bool, device=tree.tensors(u.inner)[0].device))
        for batches in steps:
            estimator = MovingAverage(self.blend, self.form)
            found = hypergradient(
                problem, w, None, batches, solver=solver, estimator=estimator, state=state, engine=engine
            )
            found.raise_if_failed()
            state = found.state
            losses.append(found.outer_loss)
            w = tree.tree_map(lambda leaf, g: leaf - self.rate * g, w, found.grad)
        assert isinstance(state, Personal), "there is a step"
        return w, state.inner, torch.stack(losses)

    def _shares(
        self, clients: Sequence[Sequence[Batches]], starts: Sequence[Any] | None, weights: Sequence[float] | None
    ) -> list[float]:
        if not clients or any(not len(batches) for batches in clients):
            raise ValueError(
                f"LocalMOML was given clients with {[len(batches) for batches in clients]} local batches; at least one "
                f"client, and a Batches for each of its local steps, were needed"
            )
        for name, given in (("starts", starts), ("weights", weights)):
            if given is not None and len(given) != len(clients):
                raise ValueError(
                    f"LocalMOML was given {len(given)} {name} for {len(clients)} clients; one each was needed"
                )
        shares = [1.0] * len(clients) if weights is None else [float(weight) for weight in weights]
        if not all(0 <= share < float("inf") for share in shares) or not sum(shares) > 0:
            raise ValueError(f"LocalMOML was given weights={weights!r}; numbers of at least 0, not all 0, were needed")
        return [share / sum(shares) for share in shares]
