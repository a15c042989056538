"""One outer step of a case, taken as often as there are meters."""

import dataclasses
import gc

import torch

import bilevel as bl
from bilevel.space import tree
from bilevel_profiling.cases.case import Case, leaves_of
from bilevel_profiling.meters.storages import storage_sizes
from bilevel_profiling.meters.tensors import Tensors


class Trial:
    """One outer step of a case that can be taken again and again.

    On a GPU it holds what a user's own loop would hold: the outer variable once, and its optimizer's state. What to put
    back waits on the host.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        gc.collect()
        with Tensors() as self._made:
            posed = case.pose()
        self.outer_step = True
        self._outer = leaves_of(posed.outer)
        self._saved = [leaf.detach().to("cpu", copy=True) for leaf in tree.tensors(self._outer)]
        self.posed = dataclasses.replace(posed, outer=self._outer)
        self._optimizer = case.outer_optimizer(tree.tensors(self._outer))
        self.tidy()

    def base_sizes(self) -> list[int]:
        """Bytes of the storages that are there between the calls: data, variables, what the losses captured of what
        `setup` made, and the outer optimizer's state once it has taken a step.
        """
        gc.collect()
        held = storage_sizes((self.posed.tensors(self.case.solver.max_steps), list(self._optimizer.state.values())))
        return list({**self._made.live_sizes(), **held}.values())

    def hypergradient(self) -> bl.Hypergradient:
        """The hypergradient alone."""
        posed, case = self.posed, self.case
        return bl.hypergradient(
            posed.problem,
            self._outer,
            posed.inner,
            posed.batches,
            solver=case.solver,
            estimator=case.at_work,
            engine=case.engine,
        )

    def __call__(self) -> bl.Hypergradient:
        """The hypergradient and, unless it failed, the outer optimizer's step."""
        if not self.outer_step:
            return self.hypergradient()
        posed, case = self.posed, self.case
        loop = bl.iterate(
            posed.problem,
            self._outer,
            posed.inner,
            [posed.batches],
            solver=case.solver,
            estimator=case.at_work,
            optimizer=self._optimizer,
            engine=case.engine,
        )
        return next(loop).hypergradient

    def prime(self) -> None:
        """Make the outer optimizer's state, with a step of zeros."""
        for leaf in tree.tensors(self._outer):
            leaf.grad = torch.zeros_like(leaf)
        self._optimizer.step()
        self.tidy()

    def tidy(self) -> None:
        """Put the outer variable and the random numbers back, and drop the gradient."""
        with torch.no_grad():
            for leaf, saved in zip(tree.tensors(self._outer), self._saved, strict=True):
                leaf.copy_(saved)
                leaf.grad = None
        torch.manual_seed(self.case.seed)
