"""Which Betty is installed, and which of its methods do not work.

The methods are tried, not looked up by version: a release that mends them is taken as it is.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

INSTALL = 'pip install --no-deps --ignore-requires-python "betty-ml==0.2.1"'
"""What to type. The flag is needed from Python 3.11 on: the release says Python < 3.11, and runs on later ones."""
MISSING = f"betty-ml is not installed. Write: {INSTALL}"


@dataclasses.dataclass(frozen=True)
class Release:
    """The Betty that is there.

    Attributes:
        version: as installed, such as "0.2.1".
        defects: what does not work, a sentence for each method: "cg", "cg_alpha", "darts", "iterative".
    """

    version: str
    defects: Mapping[str, str]


def available() -> bool:
    """Whether Betty can be imported, found without importing it."""
    return importlib.util.find_spec("betty") is not None


@functools.cache
def installed() -> Release:
    """The installed release, and what of it does not work, found by trying it on problems of two numbers.

    Raises:
        ImportError: it is not installed, with what to type.

    Example:
        >>> from bilevel.integrations.betty import release
        >>> if release.available():
        ...     assert release.installed().version
    """
    if not available():
        raise ImportError(MISSING)
    with importing():
        found = {name: probe() for name, probe in _PROBES.items()}
    version = importlib.metadata.version("betty-ml")
    return Release(version, {name: sentence for name, sentence in found.items() if sentence})


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Importing Betty imports torch.distributed.optim, which warns of torch's own use of torch.jit."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield


def _cg() -> str:
    wrong = _error(alpha=1.0, steps=2) > 1e-6
    return (
        "Betty's cg updates its direction with the old residual, so it does not converge: two steps solve a system of "
        "two unknowns, and it leaves an error of "
        f"{_error(alpha=1.0, steps=2):.0%} there. Use bilevel.Implicit(bilevel.CG(...)) in its place"
        if wrong
        else ""
    )


def _cg_alpha() -> str:
    if _error(alpha=1.0, steps=2) > 1e-6 or _error(alpha=0.5, steps=2) <= 1e-6:
        return ""
    return (
        "Betty's cg scales the curvature by cg_alpha in one place and not in the other, so it is wrong for any "
        "cg_alpha but 1"
    )


def _error(*, alpha: float, steps: int) -> float:
    """The relative error of its cg on H v = b with H = diag(1, 4), b = (1, 1)."""
    from betty.hypergradient.cg import cg

    y, x = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    curvature = torch.tensor([1.0, 4.0], dtype=torch.float64)
    lower = _lower(y, lambda: (curvature * y * y / 2 - x * y).sum(), cg_iterations=steps, cg_alpha=alpha)
    found = _called(cg, torch.ones_like(y), lower, _upper(x))
    return float((found - 1 / curvature).norm() / (1 / curvature).norm())


def _darts() -> str:
    from betty.hypergradient.darts import darts

    y, x = (torch.ones(2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    lower = _lower(y, lambda: (y * y / 2 - x * y).sum(), darts_alpha=0.01, darts_multitask=False)
    _called(darts, torch.ones_like(y), lower, _upper(x))
    moved = float((y.detach() - 1).norm())
    return (
        f"Betty's darts leaves the lower problem's parameters where it perturbed them (moved by {moved:.2g} there, by "
        f"darts_alpha); 0.2.1 puts them back"
        if moved > 1e-9
        else ""
    )


def _iterative() -> str:
    """Whether an IterativeProblem can be initialized and make a step."""
    from betty.configs import Config
    from betty.problems import IterativeProblem

    class Lower(IterativeProblem):
        def training_step(self, batch: Any) -> torch.Tensor:
            return self.params[0].square().sum()

    module = torch.nn.Linear(1, 1, bias=False)
    silent = types.SimpleNamespace(info=lambda *_: None, log=lambda *_, **__: None)
    try:
        lower = Lower("lower", Config(), module, torch.optim.SGD(module.parameters(), lr=0.1), None, [[torch.ones(1)]])
        lower._rank, lower._strategy, lower.device, lower.logger = 0, "default", "cpu", silent
        lower.initialize(*([] if installed_version() >= (0, 2) else [_engine_config()]))
        lower.one_step_descent()
    except Exception as error:  # whatever its code raises: that it cannot be used is what is asked
        return (
            f"Betty's IterativeProblem, its only way to unroll, raises {type(error).__name__}({error}). Keep an "
            f"ImplicitProblem and write bilevel.integrations.betty.use(problem, bilevel.Unrolled()), which "
            f"backpropagates through its steps"
        )
    return ""


def installed_version() -> tuple[int, ...]:
    """The release's number, as far as it is one."""
    parts = importlib.metadata.version("betty-ml").split(".")
    return tuple(int(part) for part in parts[:3] if part.isdigit())


def _engine_config() -> Any:
    from betty.configs import EngineConfig

    return EngineConfig()


def _lower(y: torch.Tensor, loss: Callable[[], torch.Tensor], **config: Any) -> Any:
    """As much of a Betty problem as its hypergradients look at."""
    return types.SimpleNamespace(
        paths=[],
        config=types.SimpleNamespace(**config),
        cur_batch=None,
        training_step_exec=lambda batch: loss(),
        parameters=lambda: [y],
        trainable_parameters=lambda: [y],
        meta_trainable_parameters=lambda: [y],
        _strategy="default",
    )


def _upper(x: torch.Tensor) -> Any:
    return types.SimpleNamespace(trainable_parameters=lambda: [x])


def _called(method: Callable[..., Any], vector: torch.Tensor, lower: Any, upper: Any) -> torch.Tensor:
    more = (False,) if installed_version() >= (0, 2) else ()
    return method([vector], lower, upper, *more)[0].detach()


_PROBES: dict[str, Callable[[], str]] = {"cg": _cg, "cg_alpha": _cg_alpha, "darts": _darts, "iterative": _iterative}
