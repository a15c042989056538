"""What comes back: Status (a sentence each), Solution of an inner or linear solve, Hypergradient.

Failures are data. Solvers report codes as 0-dim integer tensors, so that the happy path never waits for the GPU;
reading `status` waits for it. Codes are ordered by severity, so that the worst of several is their maximum.
"""

import dataclasses
import enum
from typing import Any

import torch
from torch import Tensor

from bilevel.engine import spans
from bilevel.space.tree import Leaves, Tree


class BilevelError(RuntimeError):
    """A hypergradient that must not be used, raised on request by `raise_if_failed`; its `status` says why."""

    def __init__(self, message: str, status: "Status | None" = None) -> None:
        super().__init__(message)
        self.status = status


class NotTwiceDifferentiableError(RuntimeError):
    """An operator in a loss has no second derivative and the chosen estimator needs one."""


class NotTraceableError(Exception):
    """A loss looks at the numbers of tensors, so that no graph stands for it: take `engine=bilevel.Eager()`."""


class EngineMismatchError(Exception):
    """A compiled or captured function returned other numbers than the eager one."""


class Status(enum.Enum):
    """How a computation ended. The value is a sentence to act on; the order is the order of severity."""

    OK = "Computed as asked."
    INNER_UNSTABLE = (
        "The inner loop is unstable: its loss rose over many of its steps, its last step gained next to nothing of "
        "what its "
        "gradient promised, or errors grow so much along its trajectory that "
        "few digits of the hypergradient are left: see stats['inner_rise'] and stats['digits']. Lower the step size "
        "of the "
        "inner optimizer, take fewer steps, or compute in float64."
    )
    DIGITS_LOST = (
        "Rounding leaves few digits of the hypergradient: moving its arguments by a few roundings moved it by more "
        "than a hundredth (Probed), or the two sides of a finite difference agree to all but their last digit. See "
        "stats['digits']. Compute in float64, take fewer inner steps, or a larger nu, radius, std or mu."
    )
    INNER_ROSE = (
        "The inner loss ended at more than twice its starting value: the inner loop is moving away from a solution. "
        "Lower the step size of the inner optimizer, or take fewer steps."
    )
    MAX_STEPS = (
        "The linear solver used all its steps before the residual met its tolerance, so the hypergradient is "
        "approximate: see stats['linear_residual']. Give it more steps, a larger tol, or some damping."
    )
    INNER_MAX_STEPS = (
        "The inner solver used all its steps before the gradient norm met its tolerance: see stats['inner_residual']. "
        "Give Converge more max_steps, a larger tol or a better step size."
    )
    NOT_CONTRACTIVE = (
        "The Neumann series does not contract: its residual grew. Its step_size (the rate of a single loop) must lie "
        "below 2 / (largest eigenvalue of the inner Hessian), and no eigenvalue may be negative. Lower it, add "
        "damping, or use CG, which tells the two apart. Of Chebyshev: an eigenvalue lies outside of lowest and "
        "highest; linear.spectrum finds them."
    )
    NEGATIVE_CURVATURE = (
        "Conjugate gradients met a direction of non-positive curvature: the inner Hessian is not positive definite "
        "there, so y is not a minimizer and the implicit hypergradient is not defined. The solver stopped at its last "
        "safe iterate. Take more inner steps, add damping (linear.LevenbergMarquardt chooses it) or a proximal term, "
        "or use Unrolled or FirstOrderCorrected, which do not need a definite Hessian. If the system of a saddle point "
        "is meant, linear.MINRES and linear.GMRES solve it."
    )
    STOPPED_EARLY = (
        "The inner solver stopped after so few steps that backpropagating through them does not see how the solution "
        "depends on the outer variable: see stats['cotangent_left']. Use Implicit or FirstOrderCorrected, which "
        "differentiate the solution itself, or Descent with a fixed number of steps."
    )
    UNBOUNDED = (
        "A perturbed inner loop of FirstOrderCorrected ran away from the solution: g - nu f or g + nu f has no "
        "minimum near "
        "it. Lower nu below the curvature of g over that of f, or make g more convex (a proximal term, weight decay)."
    )
    FLAT_STEP = (
        "The step of the inner optimizer does not change with its gradient, so the estimate sees nothing of the inner "
        "loss: a first step of Adam has the length lr whatever the gradient is, and a sign has no derivative. Take "
        "more inner steps, or use T1T2, Darts or Unrolled."
    )
    BREAKDOWN = (
        "The linear system is singular to working precision and its right-hand side not in its range, or the solver's "
        "recursion broke down or stood still (BiCGSTAB: take linear.GMRES; GMRES: raise restart; a preconditioner must "
        "be positive definite). Add damping, or a regularizer to the inner loss; where least squares are meant, take "
        "linear.LSMR or NormalCG with least_squares=True."
    )
    UNSOLVED = (
        "The linear solver ended with a residual above that of v = 0, so its best earlier iterate, or v = 0, was used "
        "instead. Give it more steps, add damping, or (Neumann) lower the step size, (Nystrom) raise the rank or use "
        "NystromPreconditioner in CG."
    )
    IRREVERSIBLE = (
        "The inner loop did not run backwards to its start bit by bit, so the hypergradient belongs to other steps: "
        "the inner gradient is not deterministic (torch.use_deterministic_algorithms(True) makes most so), or a "
        "number left the range of Reversible (lower its bits). Or use Revolve, which keeps snapshots."
    )
    NONFINITE = (
        "The hypergradient or a loss is not finite although the inner variable is. Look at the losses first (log of 0, "
        "division by 0, overflow in reduced precision); a hypergradient through many steps also overflows when the "
        "inner loop is chaotic."
    )
    DIVERGED = (
        "The inner loop diverged: the inner variable is not finite. Lower the step size of the inner optimizer, clip, "
        "or take fewer steps. Of a head in closed form, the kernel matrix is singular: raise its regularizer or jitter."
    )

    @property
    def code(self) -> int:
        """Position in the order of severity, 0 for OK."""
        return _STATUSES.index(self)

    @property
    def failed(self) -> bool:
        """Whether the result must not be used (an unmet tolerance alone is not a failure, it is a less accurate
        answer).
        """
        return self.code >= Status.NOT_CONTRACTIVE.code


_STATUSES = list(Status)


def status_of(code: Tensor | int) -> Status:
    """The Status of a code; waits for the GPU if the code lives there."""
    return _STATUSES[int(code)]


def readable(tensor: Tensor) -> bool:
    """Whether a tensor's value can be looked at: not inside vmap, and not when it is a fake tensor, which has none."""
    return type(tensor) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def settled(live: Tensor) -> bool:
    """Whether no task goes on. Where that cannot be read, no; on fake tensors this is announced, since a run on real
    ones might end here.
    """
    if type(live) is not Tensor:
        with spans.span(spans.UNREAD):
            return False
    return readable(live) and not bool(live.any())


def code_if(condition: Tensor, status: Status) -> Tensor:
    """The code of `status` where `condition` holds anywhere, else 0."""
    return torch.where(condition.any(), status.code, 0)


def worst(*codes: Tensor | int) -> Tensor:
    """The most severe of several codes, on the device of the tensors among them."""
    device = next((code.device for code in codes if isinstance(code, Tensor)), None)
    return torch.stack([torch.as_tensor(code, device=device).long() for code in codes]).max()


@dataclasses.dataclass(frozen=True)
class Solution:
    """What an inner solver found.

    `inner` has the structure of the start; `steps` counts updates made; `first_loss`, `last_loss` are the inner loss at
    the first and at the last point where a gradient was taken, per task (None for zero steps); `residual` is the norm
    of the stationarity there per task, for solvers that look at it; `rise` is the part of all the motion of the inner
    loss that went up, per task, and `unsteady` whether that says that the steps are too long; `promised` is what the
    last gradient step would gain per task if it were short, and `grown` the norm of its gradient over that of the
    first (0 where a tolerance was met).
    """

    inner: Tree
    steps: int
    code: Tensor | int
    first_loss: Tensor | None = None
    last_loss: Tensor | None = None
    residual: Tensor | None = None
    rise: Tensor | None = None
    unsteady: Tensor | None = None
    promised: Tensor | None = None
    grown: Tensor | None = None

    @property
    def status(self) -> Status:
        """How the solve ended."""
        return status_of(self.code)


@dataclasses.dataclass(frozen=True)
class LinearSolution:
    """What a linear solver found for A v = b.

    `residual` is |b - A v| / |b| (per task), the true one when it comes from `LinearSolver.solve`; `steps`
    counts products with A that moved v (the largest over tasks). `sure` says that a solver's own residual is the true
    one, to a few percent, so that no product need be spent on it. `damping` is what was added to A (per task), where
    the solver chose it.
    """

    value: Leaves
    residual: Tensor
    steps: Tensor | int
    code: Tensor | int
    sure: bool = False
    damping: Tensor | None = None

    @property
    def status(self) -> Status:
        """How the solve ended."""
        return status_of(self.code)


@dataclasses.dataclass(frozen=True)
class Hypergradient:
    """The result of `hypergradient`.

    Attributes:
        grad: the estimate of dF/dx, a tree like `outer`, detached.
        inner: the adapted inner variable, detached.
        outer_loss: f at `inner`, a 0-dim tensor (the mean over tasks).
        inner_loss: g at `inner` on the last inner batch, a 0-dim tensor (the mean over tasks).
        state: what the estimator carries to the next call (warm starts); pass it back as `state=`. None if it carries
            nothing.
        next_inner: where the next call's inner loop is to start; None where that is at `inner`.
        stats: `calls` (oracle calls by name), `inner_steps`, and, where they apply, `linear_residual`, `linear_steps`,
            `inner_residual`, ... as numbers or tensors.
        code: the status as an integer tensor, not yet waited for.
    """

    grad: Tree
    inner: Tree
    outer_loss: Tensor
    inner_loss: Tensor
    state: Any = None
    stats: dict[str, Any] = dataclasses.field(default_factory=dict)
    code: Tensor | int = 0
    next_inner: Tree | None = None

    @property
    def status(self) -> Status:
        """How the computation ended; waits for the GPU."""
        return status_of(self.code)

    @property
    def digits(self) -> Any:
        """The decimal digits that rounding leaves of `grad`, a 0-dim tensor: measured by `estimators.Probed`, an upper
        bound by the growth of cotangents for `Unrolled`; None where nothing was looked at.
        """
        return self.stats.get("digits")

    def raise_if_failed(self, *, strict: bool = False) -> None:
        """Raise if the hypergradient must not be used.

        Args:
            strict: also raise when a tolerance was not met.

        Raises:
            BilevelError: with the sentence of the status.
        """
        _raise_if_failed(self.status, strict=strict)


@dataclasses.dataclass(frozen=True)
class Adapted:
    """The result of `adapt`.

    Attributes:
        inner: the adapted inner variable, detached; with tasks, every tensor has a leading task dimension.
        inner_loss: g at `inner` on the last inner batch, per task: a 0-dim tensor, or of shape (T,).
        outer_loss: f at `inner` likewise; None if it was not asked for.
        stats: `calls` (oracle calls by name), `inner_steps`, and, where they apply, `inner_residual`, `inner_rise`.
        code: the status as an integer tensor, not yet waited for.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: (y - x) ** 2, lambda y, x, b: y**2)
        >>> found = bl.adapt(problem, torch.tensor(1.0), torch.tensor(0.0), bl.Batches(None, None),
        ...     solver=bl.Descent(bl.SGD(lr=0.5), steps=1))
        >>> found.inner, found.outer_loss, found.status.name
        (tensor(1.), tensor(1.), 'OK')
    """

    inner: Tree
    inner_loss: Tensor
    outer_loss: Tensor | None
    stats: dict[str, Any] = dataclasses.field(default_factory=dict)
    code: Tensor | int = 0

    @property
    def status(self) -> Status:
        """How the computation ended; waits for the GPU."""
        return status_of(self.code)

    def raise_if_failed(self, *, strict: bool = False) -> None:
        """Raise BilevelError if the inner variable must not be used; `strict`: also when a tolerance was not met."""
        _raise_if_failed(self.status, strict=strict)


def _raise_if_failed(status: Status, *, strict: bool) -> None:
    if status.failed or (strict and status is not Status.OK):
        raise BilevelError(f"{status.name}: {status.value}", status)
