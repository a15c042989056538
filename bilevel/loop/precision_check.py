"""Whether reduced precision has left anything of the hypergradient: the same one without autocast, now and then.

    cosine = <h, r> / (|h| |r|),    ratio = |h| / |r|,    h under autocast, r in float32

from the same x, y, state and batch, and the same random numbers.
"""

import contextlib
import dataclasses
import math
import time
import warnings
from collections.abc import Iterator

import torch

from bilevel.batches import Batches
from bilevel.engine.base import Engine
from bilevel.estimators.base import Estimator
from bilevel.estimators.state import State
from bilevel.hypergradient import hypergradient
from bilevel.inner.base import InnerSolver
from bilevel.outcome import Hypergradient
from bilevel.problem import Problem
from bilevel.space import tree
from bilevel.space.inner_product import Space
from bilevel.space.tree import Tree


@dataclasses.dataclass(frozen=True)
class Precision:
    """A hypergradient beside the same one in the dtype of the variables.

    Attributes:
        cosine: of the angle between the two; 0 where one of them vanished, NaN where one is not finite.
        ratio: the norm of the reduced one over that of the other.
        seconds: what the second one took.
    """

    cosine: float
    ratio: float
    seconds: float = 0.0

    @property
    def kept(self) -> float:
        """The smaller of the cosine and of the ratio, or its inverse: 1 where nothing was lost, NaN for NaN."""
        if math.isnan(self.cosine) or math.isnan(self.ratio):
            return math.nan
        return min(self.cosine, self.ratio, 1 / self.ratio if self.ratio else 0.0)


@dataclasses.dataclass(frozen=True)
class PrecisionCheck:
    """Computes every n-th hypergradient once more without autocast, and warns where the two differ; an argument of
    `OuterLoop`.

    Costs one hypergradient in the variables' own dtype every `every` steps, with its memory, but for Q numbers not at
    the same time as the other. The run is not disturbed: x, y, the state and the generators are as they were.

    Args:
        every: n; at the steps 0, n, 2 n, ...
        warn_below: warns where the cosine, the ratio of norms or its inverse is below.
        reference: the same problem in full precision. None: that of the loop, without its `MixedPrecision` and outside
            of autocast. It is needed where the losses open autocast themselves, which nobody can switch off.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range.

    Warns:
        UserWarning: with the two numbers, each time.

    Example:
        >>> import torch, bilevel as bl
        >>> one, two = torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0])
        >>> bl.loop.PrecisionCheck(warn_below=0.5).compare(one, two)
        Precision(cosine=0.6, ratio=0.2, seconds=0.0)
    """

    every: int = 100
    warn_below: float = 0.9
    reference: Problem | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 1:
            raise ValueError(
                f"PrecisionCheck() was given every={self.every!r}; a whole number of steps, at least 1, was needed"
            )
        if not 0 <= self.warn_below <= 1:
            raise ValueError(
                f"PrecisionCheck() was given warn_below={self.warn_below!r}; a number in [0, 1] was needed"
            )
        if self.reference is not None and not isinstance(self.reference, Problem):
            raise TypeError(
                f"PrecisionCheck() was given a {type(self.reference).__name__} as reference; a bilevel.Problem without "
                f"autocast was needed"
            )

    def due(self, index: int) -> bool:
        """Whether a step is one of those that are looked at."""
        return index % self.every == 0

    def full(
        self,
        problem: Problem,
        outer: Tree,
        inner: Tree | None,
        batches: Batches,
        *,
        solver: InnerSolver,
        estimator: Estimator,
        state: State | None = None,
        engine: Engine | None = None,
        reduced: bool = True,
    ) -> tuple[Tree, float]:
        """The hypergradient in full precision, and the seconds it took.

        Arguments as of `hypergradient`; `reduced` says whether the other one is made in a precision that `problem` does
        not have. Raises ValueError where the two would be the same.
        """
        begun = time.perf_counter()
        device = tree.tensors(outer)[0].device
        if not reduced and self.reference is None and not torch.is_autocast_enabled(device.type):
            raise ValueError(
                "PrecisionCheck() has nothing to compare: the loop has no MixedPrecision and runs outside of autocast. "
                "Where the losses open autocast themselves, write PrecisionCheck(reference=problem_without_autocast)"
            )
        with _no_autocast(device), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it has to say is said by the hypergradient that is used
            found: Hypergradient = hypergradient(
                self.reference or problem,
                outer,
                inner,
                batches,
                solver=solver,
                estimator=estimator,
                state=state,
                engine=engine,
            )
        return found.grad, time.perf_counter() - begun

    def compare(self, grad: Tree, reference: Tree, seconds: float = 0.0) -> Precision:
        """Two hypergradients, as one vector each."""
        # In float64: 16 digits cannot say that seven agree, and squares do not leave the range.
        ours, full = ([leaf.double() for leaf in tree.tensors(each)] for each in (grad, reference))
        space = Space()
        norms = float(space.norm(ours)), float(space.norm(full))
        if not all(math.isfinite(norm) for norm in norms):
            return Precision(math.nan, math.nan, seconds)
        if 0.0 in norms:
            same = float(norms[0] == norms[1])
            return Precision(same, same if norms[0] == 0 else math.inf, seconds)
        unit = [space.scaled(1 / norm, each) for norm, each in zip(norms, (ours, full), strict=True)]
        return Precision(round(float(space.dot(*unit)), 12), norms[0] / norms[1], seconds)

    def warn(self, index: int, found: Precision, frames: int = 2) -> None:
        """Warn of a step where too little was kept."""
        if not found.kept >= self.warn_below:
            warnings.warn(
                f"outer step {index}: reduced precision has changed the hypergradient: its cosine to the one in full "
                f"precision is {found.cosine:.3g} and its norm {found.ratio:.3g} times as large (warn_below="
                f"{self.warn_below}). Take bfloat16 or MixedPrecision(torch.float16) with its scaling where small "
                f"numbers vanish; another estimator, or a larger nu or radius, where it divides a difference; or leave "
                f" the last layers and the losses in float32",
                stacklevel=frames,
            )


@contextlib.contextmanager
def _no_autocast(device: torch.device) -> Iterator[None]:
    """Outside of an autocast that is open."""
    with contextlib.ExitStack() as stack:
        for kind in {"cpu", device.type}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
