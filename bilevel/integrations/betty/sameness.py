"""Does a loss see the tensors that are put into the places of parameters? Held against Betty's own program, once."""

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bilevel.engine import autodiff
from bilevel.integrations.betty.modules import as_leaf, dense, loss_of, no_statistics
from bilevel.integrations.betty.optimizer import Named
from bilevel.integrations.betty.program import Program


def require_same(program: Program, batch: Any, *, once: bool) -> None:
    """Raise ValueError unless the losses are the same with the parameters exchanged, as their gradients are.

    `once`: the estimator looks at one evaluation only, so that a loss may draw numbers that cannot be put back.
    """
    for problem, at in ((program.curr, batch), *((each, each.cur_batch) for each, _ in program.lower)):
        own = {**program.inner, **program.outer, **program.fixed()}
        plain, again, ours = (_numbers(program, problem, at, own, exchanged) for exchanged in (False, False, True))
        eps = torch.finfo(next(iter(program.inner.values())).dtype).eps
        apart = min(1e4 * eps, 0.02)
        if _differ(plain, again, apart):
            if once:
                continue
            raise ValueError(
                f"training_step of problem {problem.name} gives {again[0]:.6g} after {plain[0]:.6g} when it is called "
                f"again with the same parameters, batch and random numbers (torch's, numpy's and Python's own): a "
                f"call changes what the next one sees (a counter of its own, the batch in place), or it draws from a "
                f"generator of its own. Let it be a function of the parameters and the batch, or use "
                f"bilevel.Implicit(bilevel.CG(10)), which looks at it once"
            )
        if _differ(plain, ours, apart):
            raise ValueError(
                f"training_step of problem {problem.name}, or its gradient, is not the same where the parameters are "
                f"exchanged for tensors of the same numbers ({ours[0]:.6g}, and {plain[0]:.6g} with the parameters "
                f"themselves). It holds on to parameter objects (a list made earlier, a closure), or asks which "
                f"objects they are (id(p), isinstance(p, torch.nn.Parameter), p in a set), and what it does with those "
                f"has no derivative. Take them from the module in each call, and choose them by their names, from "
                f"self.module.named_parameters()"
            )


def _numbers(program: Program, problem: Any, batch: Any, own: Named, exchanged: bool) -> tuple[float, Tensor]:
    """The loss and its gradient by the parameters, as they are or exchanged."""
    with _undisturbed(program):
        tensors = {name: as_leaf(leaf) for name, leaf in own.items()} if exchanged else own
        rest = {name: as_leaf(leaf) for name, leaf in program.rest.items()}
        loss = program.call({**rest, **tensors}, problem, batch) if exchanged else loss_of(problem, batch)
        at = list(tensors.values())
        found = autodiff.filled(autodiff.grad([loss], at), at) if loss.requires_grad else at[:0]
        return float(loss.detach()), torch.cat([torch.zeros(1), *(dense(g).double().flatten().cpu() for g in found)])


@contextlib.contextmanager
def _undisturbed(program: Program) -> Iterator[None]:
    device = next(iter(program.inner.values())).device
    devices = [device] if device.type == "cuda" else []
    numpy, drawn = sys.modules.get("numpy"), random.getstate()
    state = None if numpy is None else numpy.random.get_state()
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), no_statistics(program.known):
        # (Each block begins from the same random numbers, since each puts them back.)
        try:
            yield
        finally:
            random.setstate(drawn)
            if numpy is not None:
                numpy.random.set_state(state)


def _differ(one: tuple[float, Tensor], other: tuple[float, Tensor], apart: float) -> bool:
    """Whether two losses, or their gradients, are further apart than rounding."""
    (a, g), (b, h) = one, other
    return g.shape != h.shape or abs(a - b) > apart * abs(a) or float((g - h).norm()) > apart * float(g.norm())
