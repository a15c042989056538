"""A Betty program of one lower and one upper problem that share a `Call`: what is needed of Betty, of either release.

The upper problem's module holds x and its training_step is f; its optimizer step is caught, not made. The lower one's
holds y and its training_step is g. Nothing here is imported from Betty before it is used.
"""

import contextlib
import dataclasses
import functools
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from bilevel.integrations.betty import release
from bilevel.space import tree

MENDED = (
    "IterativeProblem is mended: in 0.2.1 it stops with KeyError('params') because it makes its optimizer "
    "differentiable before that has a state; the optimizer starts afresh with every inner loop (Betty's keeps a "
    "momentum whose graph is gone); the gradients of earlier steps are dropped (Betty's keep the graph of a step alive "
    "for ever)."
)


@dataclasses.dataclass
class Call:
    """One hypergradient: what the two Betty problems share, and what is caught from them."""

    problem: bl.Problem
    outer: Any
    batches: bl.Batches
    steps: int
    start: Any
    """y_0, a tree; with a graph where Problem.init gave it one and the method follows it."""
    xs: Sequence[Tensor] = ()
    taken: int = 0
    grad: Sequence[Tensor | None] = ()
    outer_loss: Tensor | None = None
    begins_at_solution: bool = False
    """Whether the method evaluates g at y_K first, after the last step, and not at a point beside it."""
    at_solution: Tensor | None = None
    """g at y_K, where the method evaluates it there."""

    def of_outer(self, ys: Sequence[Tensor]) -> Tensor:
        """f at the inner tensors `ys`."""
        loss = self.problem.outer(self.like_start(ys), tree.like(self.outer, list(self.xs)), self.batches.outer)
        self.outer_loss = loss.detach()
        return loss

    def of_inner(self, ys: Sequence[Tensor]) -> Tensor:
        """g at the inner tensors `ys`, on the batch of the step, after the last one on that of the derivatives."""
        step, self.taken = self.taken, self.taken + 1
        batch = self.batches.inner_at(step) if step < self.steps else self.batches.at_solution(self.steps)
        loss = self.problem.inner(self.like_start(ys), tree.like(self.outer, list(self.xs)), batch)
        if step == self.steps and self.begins_at_solution:
            self.at_solution = loss.detach()
        return loss

    def like_start(self, ys: Sequence[Tensor]) -> Any:
        """Inner tensors in the structure of y."""
        return tree.like(self.start, list(ys))

    def begins(self) -> tuple[Tensor, ...]:
        """y_0 for a loop that moves out of place: tensors with a gradient, sharing memory with what was given."""
        return tuple(
            leaf.view_as(leaf) if leaf.requires_grad else leaf.detach().requires_grad_()
            for leaf in tree.tensors(self.start)
        )


class Held(torch.nn.Module):
    """Tensors as the parameters of a module."""

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        super().__init__()
        self.leaves = torch.nn.ParameterList([torch.nn.Parameter(leaf) for leaf in leaves])


@dataclasses.dataclass(frozen=True)
class Classes:
    """What is needed of Betty, of whichever release."""

    upper: Any
    solution: Any
    steps: Any
    config: Any
    engine: Any
    engine_config: Any
    methods: frozenset[str]

    @property
    def chooses_device(self) -> bool:
        """Whether the Engine places the modules (0.2.1), and not each problem (0.1.1)."""
        return any(field.name == "strategy" for field in dataclasses.fields(self.engine_config))

    def strategy(self, device: torch.device) -> dict[str, str]:
        """What tells the Engine to leave the modules where they are."""
        return {"strategy": "gpu" if device.type == "cuda" else "cpu"} if self.chooses_device else {}

    def placed(self, device: torch.device) -> dict[str, Any]:
        """What tells a problem likewise."""
        return {} if self.chooses_device else {"device": device}


@functools.cache
def classes() -> Classes:
    """The problems of a program, of the installed release.

    Raises:
        ImportError: betty-ml is not installed.
    """
    if not release.available():
        raise ImportError(release.MISSING)
    with release.importing():
        from betty.configs import Config, EngineConfig
        from betty.engine import Engine
        from betty.hypergradient import jvp_fn_mapping
        from betty.problems import ImplicitProblem, IterativeProblem

    class Upper(ImplicitProblem):
        """x and f; its step is caught, not made."""

        def training_step(self, batch: Any) -> Tensor:
            (low,) = self.children
            loss: Tensor = self.call.of_outer(low.trainable_parameters())
            return loss

        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            self.call.grad = [leaf.grad for leaf in self.module.parameters()]

    class AtSolution(ImplicitProblem):
        """y and g, for the methods that differentiate the solution."""

        def training_step(self, batch: Any) -> Tensor:
            loss: Tensor = self.call.of_inner(self.trainable_parameters())
            return loss

    class Steps(IterativeProblem):
        """y and g, for backpropagation through the steps. Mended: see MENDED."""

        _fp16 = False  # asked for in 0.2.1, which no longer sets it

        def training_step(self, batch: Any) -> Tensor:
            loss: Tensor = self.call.of_inner(self.trainable_parameters())
            return loss

        def patch_optimizer(self) -> None:
            if self.params is not None:  # 0.2.1 calls it too early, before there are functional parameters
                super().patch_optimizer()

        def on_inner_loop_start(self) -> None:
            self.params = self.call.begins()
            self.optimizer.state = [_fresh(self.moved_by, leaf) for leaf in self.params]
            # The module is not looked at again: it need not hold a second y and its gradient.
            for held, leaf in zip(self.module.parameters(), self.params, strict=True):
                held.grad, held.data = None, leaf.detach()

        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            before = self.params
            if any(leaf.grad is None for leaf in before):
                raise ValueError(
                    "Betty's differentiable optimizers drop inner tensors that the inner loss does not use; leave them "
                    "out of the inner variable for betty unrolled"
                )
            super().optimizer_step(*args, **kwargs)
            for leaf in before:
                leaf.grad = None

    found = [name for name in ("cg", "neumann", "darts", "sama") if name in jvp_fn_mapping] + ["unrolled"]
    return Classes(Upper, AtSolution, Steps, Config, Engine, EngineConfig, frozenset(found))


def _fresh(update: Any, leaf: Tensor) -> dict[str, Any]:
    """The state of Betty's differentiable optimizer before its first step."""
    if isinstance(update, bl.SGD):
        return {}
    return {"step": 0, "exp_avg": torch.zeros_like(leaf), "exp_avg_sq": torch.zeros_like(leaf)}


@contextlib.contextmanager
def placed_on(device: torch.device) -> Iterator[None]:
    """Betty says "cuda" and means the current device."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def explained(call: Call, method: str) -> Iterator[None]:
    """A sentence where a product with the Hessian fails because an inner tensor has none.

    Raises:
        ValueError: it does.
    """
    try:
        yield
    except RuntimeError as error:
        known = ("does not require grad and does not have a grad_fn", "appears to not have been used in the graph")
        if call.taken <= call.steps or not any(words in str(error) for words in known):
            raise
        raise ValueError(
            f"Betty's {method} takes products with the Hessian in every inner tensor, and the gradient of the inner "
            f"loss in one of them depends on none (it enters linearly, or not at all): leave it out of the inner "
            f"variable ({str(error).partition('.')[0]})"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing on the terminal: neither Betty's logger, which is left as it was found, nor torch's warnings about how
    Betty keeps gradients.
    """
    from betty.logging import logger_base

    logger = logging.getLogger("betty")
    found, handlers = logger_base._logger, list(logger.handlers)
    propagate, level, disabled = logger.propagate, logger.level, logger.disabled
    logger.disabled = True
    try:
        with warnings.catch_warnings():
            for message in (".*create_graph=True.*", ".*not a leaf Tensor.*", ".*functorch.*"):
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        logger_base._logger, logger.handlers[:] = found, handlers
        logger.propagate, logger.level, logger.disabled = propagate, level, disabled
