"""What a Betty problem did since its inner loop began, so that its steps can be differentiated.

Betty's ImplicitProblem moves its parameters in place and forgets. A recording keeps, for one inner loop: the
parameters and the optimizer's state at its start (P, and 2 P more for Adam), and for each step the batch, the settings
of the optimizer and the state of the random numbers. The replay must end where the parameters are; else it is refused.
"""

import dataclasses
import weakref
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from bilevel.integrations.betty.modules import norm
from bilevel.integrations.betty.optimizer import Continued, state_of, steps_as
from bilevel.integrations.betty.program import Program

_DIFFERS, _ROUNDING = 1e-3, 0.02
"""The part of the way that a replay may end beside, and the most of it that rounding may be."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """One step: its batch, the random numbers before its loss, and the optimizer's settings."""

    batch: Any
    random: tuple[Tensor, Tensor | None]
    optimizer: bl.Optimizer


class Recording:
    """Keeps the last inner loop of a problem, from now on.

    It listens to `problem.get_batch`, which Betty calls once at the beginning of each step, on this one object.

    Args:
        problem: an ImplicitProblem.
    """

    def __init__(self, problem: Any) -> None:
        self._reference = weakref.ref(problem)
        self._start: list[Tensor] = []
        self._state: Any = None
        self.steps: list[Seen] = []
        original = problem.get_batch

        def get_batch(*arguments: Any, **keywords: Any) -> Any:
            batch = original(*arguments, **keywords)
            self._see(batch)
            return batch

        problem.get_batch = get_batch

    @property
    def _problem(self) -> Any:
        """(A recording is known by its problem, which it must not keep alive.)"""
        return self._reference()

    def _see(self, batch: Any) -> None:
        problem = self._problem
        parameters = list(problem.trainable_parameters())
        named = {str(i): leaf for i, leaf in enumerate(parameters)}
        if (problem.count - 1) % max(problem.config.unroll_steps, 1) == 0:
            self._start = [leaf.detach().clone() for leaf in parameters]
            self._state = state_of(problem.optimizer, parameters)
            self.steps = []
        # (The settings by number: names are known when the loop is replayed.)
        self.steps.append(
            Seen(batch, random_state(parameters[0].device), steps_as(problem.name, problem.optimizer, named))
        )

    def replayed(self, program: Program) -> tuple[bl.Problem, dict[str, Tensor], bl.Descent, bl.PerStep]:
        """The recorded inner loop as a problem, its start, its solver, and its batches.

        Raises:
            ValueError: it cannot be replayed.
        """
        problem = self._problem
        self._refuse(problem)
        if len(self.steps) != problem.config.unroll_steps:
            raise ValueError(
                f"problem {problem.name} has made {len(self.steps)} recorded steps of its inner loop, whose "
                f"unroll_steps is {problem.config.unroll_steps}. Either what is above waits for another problem with "
                f"other unroll_steps, and came in the middle: give both the same; or use() was called after the engine "
                f"began"
            )
        names = list(program.inner)
        optimizers = [_renamed(step.optimizer, names) for step in self.steps]
        same = all(each == optimizers[0] for each in optimizers)
        moving: bl.Optimizer = optimizers[0] if same else bl.Scheduled(tuple(optimizers))
        state = self._state if same else {"step": 0, "inside": self._state}
        started = dict(zip(names, self._start, strict=True))

        def inner_loss(inner: Any, outer: Any, step: Seen) -> Tensor:
            set_random_state(step.random)
            return program.loss(inner, outer, step.batch)

        posed = bl.Problem(
            inner_loss, lambda y, x, v: sum(((y[n] - program.inner[n].detach()) * v[n]).sum() for n in v)
        )
        return (
            posed,
            started,
            bl.Descent(Continued(moving, state), len(self.steps)),
            bl.PerStep(self.steps, ragged=True),
        )

    def check(self, ended: dict[str, Tensor], program: Program) -> None:
        """Raise ValueError unless a replay ended where the parameters are."""
        away = [ended[name] - now.detach() for name, now in program.inner.items()]
        way = [now.detach() - start for now, start in zip(program.inner.values(), self._start, strict=True)]
        size = norm(list(program.inner.values()))
        rounding = 100 * max(torch.finfo(leaf.dtype).eps for leaf in program.inner.values()) * size
        if not norm(away) <= _DIFFERS * norm(way) + min(rounding, _ROUNDING * norm(way)):
            raise ValueError(
                f"the steps of problem {self._problem.name} could not be replayed: from the same start, on the same "
                f"batches, they end {norm(away):.1e} away after a way of {norm(way):.1e}. Something "
                f"else moves its parameters (a callback, another problem), its loss keeps a state, its loader fills "
                f"the tensors of earlier batches anew, or another upper problem has already made its step. Use an "
                f"estimator at the solution, such as bilevel.Implicit(bilevel.CG(10))"
            )

    @staticmethod
    def _refuse(problem: Any) -> None:
        refused = {
            "gradient_accumulation": getattr(problem, "gas", 1) != 1,
            "gradient_clipping": getattr(problem, "gradient_clipping", 0.0) > 0,
            "precision='fp16'": getattr(problem, "scaler", None) is not None,
            "roll_back": bool(getattr(problem, "_roll_back", False)),
        }
        if used := [name for name, there in refused.items() if there]:
            raise ValueError(
                f"problem {problem.name} uses {', '.join(used)}, so its steps are more than its optimizer's, "
                f"and cannot be differentiated here. Leave it out, or use an estimator at the solution, such as "
                f"bilevel.Implicit(bilevel.CG(10))"
            )


def random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The states of torch's random numbers on the CPU and on the device."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_state(state: tuple[Tensor, Tensor | None]) -> None:
    """Put them back."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])


def _renamed(optimizer: bl.Optimizer, names: list[str]) -> bl.Optimizer:
    """Settings by number as settings by name."""

    def by_name(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(by_name, value))
        return {names[int(number)]: each for number, each in value.items()} if isinstance(value, dict) else value

    settings = {field.name: by_name(getattr(optimizer, field.name)) for field in dataclasses.fields(optimizer)}  # type: ignore[arg-type]
    return type(optimizer)(**settings)
