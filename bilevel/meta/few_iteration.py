"""The few-iteration base learner: a linear classifier found by a few steepest-descent steps on a learned objective.

    s = w z    (scores of the classes)     sg = +1 for the own class, -1 for the others     y+, y-: targets
    phi_a(t) = (1 - a)/2 |t| + (1 + a)/2 t          a = 1: least squares; a = 0: squared hinge; |t| is 0 up to rounding
    r1 = c phi_a(sg (y - s))      r2 = rho w        c, a: one for the own class, one for the others
    g(w) = 1/2 |r1|^2 + 1/2 |r2|^2 + kappa/n_q sum_q H(softmax(T w z_q))           H: entropy; z_q: query inputs
    start: w f+ = y+ and w f- = y-       f+: mean feature of the class, f-: mean feature of the others
    step: bl.inner.SteepestDescent with |J d|^2 + kappa/n_q sum_q Var_p(T d z_q), floor 1e-8, damping 0.05

The step's curvature leaves out what is not positive semidefinite in the entropy's, so with kappa > 0 it is no exact
line search.

| | inner gradients | products J d | memory |
| --- | --- | --- | --- |
| N steps, Unrolled | N | N | features once, and N tapes of a problem in ways x d numbers |

Reference: Tripathi, Danelljan, Van Gool, Timofte 2020, Few-Shot Classification By Few-Iteration Meta-Learning, arXiv
2010.00511. Differences: no weights over spatial cells (features are vectors); the outer loss is of the last iterate
alone; the variance is that of T s, where the released code takes T = 1 at its start.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from bilevel.functional import functional
from bilevel.inner.descent import Descent
from bilevel.inner.steepest_descent import SteepestDescent
from bilevel.problem import Problem
from bilevel.space.tree import Tree

Variables = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class FewIteration:
    """A linear classifier on features as what adapts, its objective learned.

    Args:
        ways: classes of a task, at least 2. Labels are 0 .. ways - 1, and each has an example in the support set.
        transductive: whether the entropy of the predictions on the query inputs is part of the inner loss. The inner
            batch then has three entries, (support inputs, labels, query inputs).
        entropy: the start of kappa, at least 0. (The released code starts at 1e3.)
        floor: the least curvature of a step.
        damping: of a step's length.

    The outer variable is a dict of two: "parameters" of the module and the "objective", whose tensors are `target`,
    `weight` and `slope` (two numbers each: own class, others; they start at 5 and -5, 1, 1), `ridge` (0) and, where
    transductive, `entropy` and `temperature` (1).

    Raises:
        ValueError: an argument is out of range; (when used) the batch has another number of entries, or features are no
            matrix with at least two columns. With a label out of range, or a class without an example, the start is
            not finite, and the status says so.

    Example:
        >>> import torch, bilevel as bl
        >>> learner = FewIteration(ways=2)
        >>> problem, x = learner.problem(torch.nn.Linear(3, 4))
        >>> support = torch.eye(3)[None].repeat(2, 1, 1), torch.tensor([[0, 1, 1]] * 2)
        >>> hg = bl.hypergradient(problem, x, None, bl.Batches(inner=support, outer=support), solver=learner.solver(5),
        ...     estimator=bl.TaskMean(bl.Unrolled()))
        >>> hg.status.name, hg.inner.shape, sorted(hg.grad["objective"])
        ('OK', torch.Size([2, 2, 4]), ['ridge', 'slope', 'target', 'weight'])
    """

    ways: int
    transductive: bool = False
    entropy: float = 1.0
    floor: float = 1e-8
    damping: float = 0.05

    def __post_init__(self) -> None:
        if not isinstance(self.ways, int) or isinstance(self.ways, bool) or self.ways < 2:
            raise ValueError(f"FewIteration was given ways={self.ways!r}; an integer of at least 2 was needed")
        if not isinstance(self.entropy, (int, float)) or not 0 <= self.entropy < float("inf"):
            raise ValueError(f"FewIteration was given entropy={self.entropy!r}; a number of at least 0 was needed")
        SteepestDescent(self.residuals, floor=self.floor, damping=self.damping)

    # --- the objective, of one task

    def variables(self, like: Tensor) -> Variables:
        """What is learned of the objective: fresh tensors at their start, of the dtype and device of `like`."""
        made = {"target": [5.0, -5.0], "weight": [1.0, 1.0], "slope": [1.0, 1.0], "ridge": 0.0}
        if self.transductive:
            made |= {"entropy": float(self.entropy), "temperature": 1.0}
        return {name: torch.tensor(value, dtype=like.dtype, device=like.device) for name, value in made.items()}

    def start(self, features: Tensor, labels: Tensor, variables: Variables) -> Tensor:
        """The closed form: w of shape (ways, d) with w f+ = y+ and w f- = y- for each class."""
        own = self._own(features, labels)
        count = own.sum(0).to(features.dtype)[:, None]
        members = own.to(features.dtype).T
        # (0/0 for a class without examples is meant: a classifier cannot be made, and the status says so.)
        f_own, f_other = members @ features / count, (1 - members) @ features / (len(features) - count)
        y_own, y_other = variables["target"]
        aa, bb, ab = ((f * h).sum(1, keepdim=True) for f, h in ((f_own, f_own), (f_other, f_other), (f_own, f_other)))
        start = ((y_own * bb - y_other * ab) * f_own - (y_own * ab - y_other * aa) * f_other) / (aa * bb - ab.square())
        known = ((labels >= 0) & (labels < self.ways)).all()
        return torch.where(known, start, torch.nan)

    def scores(self, w: Tensor, features: Tensor) -> Tensor:
        """Scores of shape (n, ways)."""
        return features @ w.T

    def residuals_at(self, w: Tensor, features: Tensor, labels: Tensor, variables: Variables) -> tuple[Tensor, Tensor]:
        """(r1, r2), of shapes (n, ways) and (ways, d)."""
        own = self._own(features, labels)
        target, weight, slope = (
            torch.where(own, variables[name][0], variables[name][1]) for name in ("target", "weight", "slope")
        )
        sign = own.to(features.dtype) * 2 - 1
        missed = sign * (target - self.scores(w, features))
        # The only example of a class meets its target at the start. Rounding must not choose a side of the kink there.
        at_kink = missed.abs() <= torch.finfo(missed.dtype).eps ** 0.5 * variables["target"].abs().max()
        shaped = (1 - slope) / 2 * torch.where(at_kink, 0.0, missed).abs() + (1 + slope) / 2 * missed
        return weight * shaped, variables["ridge"] * w

    def uncertainty(self, w: Tensor, queries: Tensor, variables: Variables) -> Tensor:
        """kappa/n_q times the sum of the entropies of the predictions on query features, in nats."""
        logs = log_softmax(variables["temperature"] * self.scores(w, queries), dim=1)
        return -variables["entropy"] * (logs.exp() * logs).sum() / len(queries)

    def _own(self, features: Tensor, labels: Tensor) -> Tensor:
        if features.dim() != 2 or features.shape[1] < 2 or labels.shape != features.shape[:1]:
            raise ValueError(
                f"FewIteration was given features of shape {tuple(features.shape)} and labels of shape "
                f"{tuple(labels.shape)} for one task; (n, d) with d of at least 2, and (n,), were needed. Let the "
                f"module end in torch.nn.Flatten()"
            )
        return labels[:, None] == torch.arange(self.ways, device=labels.device)

    # --- the same as functions of (inner, outer, batch), the batch being features

    def residuals(self, w: Tensor, outer: Tree, batch: Any) -> tuple[Tensor, Tensor]:
        """The residuals, as `SteepestDescent` calls them."""
        return self.residuals_at(w, batch[0], batch[1], outer["objective"])

    def curvature(self, w: Tensor, direction: Tensor, outer: Tree, batch: Any) -> Tensor:
        """The positive semidefinite part of the entropy's curvature along a direction: kappa/n_q sum_q Var_p(T d z_q),
        as `SteepestDescent` calls it.
        """
        variables, queries = outer["objective"], batch[2]
        chances = (variables["temperature"] * self.scores(w, queries)).softmax(1)
        change = variables["temperature"] * self.scores(direction, queries)
        mean = (chances * change).sum(1, keepdim=True)
        return variables["entropy"] * (chances * (change - mean).square()).sum() / len(queries)

    def inner_loss(self, w: Tensor, outer: Tree, batch: Any) -> Tensor:
        """g(w)."""
        first, second = self.residuals(w, outer, batch)
        loss = (first.square().sum() + second.square().sum()) / 2
        return loss + self.uncertainty(w, batch[2], outer["objective"]) if self.transductive else loss

    def outer_loss(self, w: Tensor, outer: Tree, batch: Any) -> Tensor:
        """Cross-entropy of the scores on the query set."""
        return cross_entropy(self.scores(w, batch[0]), batch[1])

    # --- what is handed to the library

    def solver(self, steps: int = 5) -> Descent:
        """The solver of `problem`: steps of steepest descent.

        Args:
            steps: N >= 0; 0 is the closed form alone.
        """
        curvature = self.curvature if self.transductive else None
        return Descent(SteepestDescent(self.residuals, curvature, damping=self.damping, floor=self.floor), steps)

    def problem(self, module: nn.Module) -> tuple[Problem, dict[str, Variables]]:
        """The problem of one task, and its outer variable with leaves that require grad.

        Args:
            module: inputs -> features of shape (n, d). It is not changed; those of its parameters that require grad are
                cloned, the others stay as they are.

        Batches: inner (support inputs, labels), with the query inputs as a third entry where transductive; outer (query
        inputs, labels). The module sees each of them by itself.
        """
        call, given = functional(module, requires_grad=False)

        def features(outer: Tree, batch: Any) -> tuple[Tensor, ...]:
            inputs, labels, *queries = batch
            return call(outer["parameters"], inputs), labels, *(call(outer["parameters"], each) for each in queries)

        def support(outer: Tree, batch: Any) -> tuple[Tensor, ...]:
            needed = 3 if self.transductive else 2
            if not isinstance(batch, (tuple, list)) or len(batch) != needed:
                given = f"{len(batch)} entries" if isinstance(batch, (tuple, list)) else type(batch).__name__
                wanted = "(inputs, labels, query inputs)" if self.transductive else "(inputs, labels)"
                raise ValueError(
                    f"FewIteration was given an inner batch of {given}; {wanted} was needed with "
                    f"transductive={self.transductive}"
                )
            return features(outer, batch[:2])

        def init(outer: Tree, batch: Any) -> Tensor:
            z, labels = support(outer, batch)
            return self.start(z, labels, outer["objective"])

        parameters = {name: leaf.detach().clone() for name, leaf in given.items()}
        objective = self.variables(next(iter(parameters.values()), torch.zeros(())))
        outer = {"parameters": parameters, "objective": objective}
        for leaf in (*parameters.values(), *objective.values()):
            leaf.requires_grad_()
        return Problem(self.inner_loss, self.outer_loss, init=init, features=features), outer
