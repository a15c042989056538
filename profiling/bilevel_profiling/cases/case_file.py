"""Case files: a Python file, or a built-in module, with `setup(device)` and whatever else it wants to fix.

| name | what it is | if missing |
| --- | --- | --- |
| `setup(device)` | makes (problem, outer, inner, batches) | an error |
| `ESTIMATORS` | dict of label to estimator | `default_estimators()` |
| `PARALLEL` | a `Parallel`, such as DATA or TASKS: how its work is split over processes | it runs on one only |
| `BASELINES` | dict of label to a function that returns a hypergradient, or a `Baseline` | none of its own |
| `ENGINES` | dict of label to engine: each estimator is a row with each | the default, eager |
| `OPTIMIZER` | the inner optimizer; or an inner solver, whose limit of steps is then K | bl.SGD(lr=0.1) |
| `INNER_STEPS` | the K to compare at | 1, 5, 20 |
| `SOLVERS` | dict of label to inner solver, in place of the two above | Descent with these |
| `SOLUTION` | an inner solver that converges, for the error against the solution | no such error |
| `outer_optimizer(tensors)` | a torch optimizer | Adam, lr 1e-2 |
| `batches(step, device)` | the Batches of an outer step | those of `setup`, every time |
| `evaluate(outer, device)` | dict of metrics, called before and after the outer loop | no metrics |
| `OUTER_STEPS` | length of the outer loop | 0: no loop |
| `PRELOAD` | names of modules that take long to import, loaded once for all processes | none |

The functions `setup`, `batches` and `evaluate` are given `seed=` if they have such a parameter.
"""

import ast
import dataclasses
import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import bilevel as bl
from bilevel_profiling.baselines.baseline import Baseline, Function
from bilevel_profiling.cases import builtin as cases
from bilevel_profiling.cases import engines as named_engines
from bilevel_profiling.cases import library
from bilevel_profiling.cases.case import OuterOptimizer, Setup, adam, name_of
from bilevel_profiling.cases.parallel import Parallel

MOVES: tuple[type, ...] = (bl.Optimizer, bl.InnerSolver, *filter(None, [getattr(bl.inner, "Dynamics", None)]))


class CaseError(ValueError):
    """A case that cannot be used, with a message that says what to write."""


def default_estimators() -> dict[str, bl.Estimator]:
    """What a case that names no estimators is compared with. Those that cannot handle the problem become rows that say
    so.
    """
    return {
        "unrolled": bl.Unrolled(),
        "unrolled iterates": bl.Unrolled(keep="iterates"),
        "unrolled segments": bl.Unrolled(keep="segments"),
        "implicit CG": bl.Implicit(bl.CG(max_steps=10)),
        "memory-reduced": bl.MemoryReduced(),
        "first-order corrected": bl.FirstOrderCorrected(),
    }


@dataclasses.dataclass(frozen=True)
class Definition:
    """A case, as its file or its caller defines it."""

    name: str
    setup: Setup
    estimators: Mapping[str, bl.Estimator] = dataclasses.field(default_factory=default_estimators)
    optimizer: bl.Optimizer | bl.InnerSolver = dataclasses.field(default_factory=lambda: bl.SGD(lr=0.1))
    inner_steps: tuple[int, ...] = (1, 5, 20)
    solvers: Mapping[str, bl.InnerSolver] = dataclasses.field(default_factory=dict)
    solution: bl.InnerSolver | None = None
    outer_optimizer: OuterOptimizer = adam
    batches: Callable[..., bl.Batches] | None = None
    evaluate: Callable[..., Mapping[str, float]] | None = None
    outer_steps: int = 0
    preload: tuple[str, ...] = ()
    baselines: Mapping[str, Function | Baseline] = dataclasses.field(default_factory=dict)
    engines: Mapping[str, bl.Engine] = dataclasses.field(default_factory=dict)
    """None: the default of the library."""
    parallel: Parallel | None = None
    title: str = ""
    """The first line of the file's docstring."""

    def __post_init__(self) -> None:
        for value, kind, name, write in (
            (self.optimizer, MOVES, "OPTIMIZER (optimizer=)", "bl.SGD(lr=0.1)"),
            (
                self.solution,
                (bl.InnerSolver, type(None)),
                "SOLUTION (solution=)",
                "bl.Converge(bl.SGD(lr=0.1), tol=1e-8)",
            ),
        ):
            if not isinstance(value, kind):
                raise CaseError(f"case {self.name}: {name} is a {type(value).__name__}; write {write}")
        if not (isinstance(self.estimators, Mapping) and self.estimators):
            raise CaseError(
                f"case {self.name}: ESTIMATORS is not a dict with at least one entry; write "
                f'{{"unrolled": bl.Unrolled()}}'
            )
        if not self.name or "" in self.estimators:
            raise CaseError(f"case {self.name!r}: a case and an estimator need a name, and one of them is ''")
        for label, estimator in self.estimators.items():
            if not isinstance(label, str) or not isinstance(estimator, bl.Estimator):
                raise CaseError(
                    f"case {self.name}: ESTIMATORS maps {label!r} to a {type(estimator).__name__}; "
                    f'write "label": bl.Unrolled()'
                )
        self._check_baselines()
        if not isinstance(self.parallel, (Parallel, type(None))):
            raise CaseError(
                f"case {self.name}: PARALLEL (parallel=) is {self.parallel!r}; DATA, TASKS or a Parallel of "
                f"bilevel_profiling was needed"
            )
        if not isinstance(self.engines, Mapping) or not all(
            isinstance(label, str) and label and isinstance(engine, bl.Engine) for label, engine in self.engines.items()
        ):
            raise CaseError(
                f"case {self.name}: ENGINES (engines=) is {self.engines!r}; a dict of engines was needed, such as "
                f'{{"eager": bl.Eager(), "compiled": bl.Compiled()}}'
            )
        if not isinstance(self.solvers, Mapping) or not all(
            isinstance(solver, bl.InnerSolver) for solver in self.solvers.values()
        ):
            raise CaseError(
                f"case {self.name}: SOLVERS (solvers=) is {self.solvers!r}; a dict of inner solvers was needed, "
                f'such as {{"to 1e-6": bl.Converge(bl.SGD(lr=0.1), tol=1e-6)}}'
            )
        steps = self.inner_steps
        if not steps or not all(isinstance(k, int) and not isinstance(k, bool) and k >= 0 for k in steps):
            raise CaseError(
                f"case {self.name}: INNER_STEPS is {list(steps)!r}; a list of integers of at least 0 was needed, such "
                f"as [1, 5, 20]"
            )
        if not isinstance(self.outer_steps, int) or self.outer_steps < 0:
            raise CaseError(
                f"case {self.name}: OUTER_STEPS is {self.outer_steps!r}; an integer of at least 0 was needed"
            )
        if isinstance(self.preload, str) or not all(isinstance(name, str) for name in self.preload):
            raise CaseError(
                f"case {self.name}: PRELOAD is {self.preload!r}; names of modules were needed, "
                f'such as ["sklearn.datasets"]'
            )
        for name in ("setup", "outer_optimizer", "batches", "evaluate"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise CaseError(f"case {self.name}: {name} is a {type(value).__name__}; a function was needed")

    def _check_baselines(self) -> None:
        found = self.baselines
        if not isinstance(found, Mapping) or not all(
            isinstance(label, str) and label and callable(getattr(value, "function", value))
            for label, value in found.items()
        ):
            raise CaseError(
                f"case {self.name}: BASELINES (baselines=) is {found!r}; a dict of functions was needed, such as "
                f'{{"mine": my_hypergradient}}, called as my_hypergradient(problem, outer, inner, batches, solver)'
            )
        if twice := [label for label in found if label in self.estimators]:
            raise CaseError(f"case {self.name}: {twice[0]!r} is an estimator and a baseline; give one another label")

    @property
    def compared(self) -> dict[str, bl.Estimator]:
        """What a comparison has rows of: the estimators, then the baselines."""
        return self.among(())

    def among(self, labels: Sequence[str]) -> dict[str, bl.Estimator]:
        """The same where these labels were asked for (none: all): the baselines are over tasks where the estimators
        are, weighted as by those asked for. Where they weight them differently the first counts, and the rows say so.
        """
        asked = [each for label, each in self.estimators.items() if label in labels and isinstance(each, bl.TaskMean)]
        means = asked or [each for each in self.estimators.values() if isinstance(each, bl.TaskMean)]
        made = {
            label: value if isinstance(value, Baseline) else Baseline(value) for label, value in self.baselines.items()
        }
        if not means:
            return {**self.estimators, **made}
        if len({repr(each.weights) for each in means}) > 1:
            first = next(label for label, each in self.estimators.items() if each is means[0])
            said = f"Its tasks are weighted as those of {first}; others in this comparison weight them otherwise."
            made = {label: dataclasses.replace(each, notes=(*each.notes, said)) for label, each in made.items()}
        over = {label: dataclasses.replace(means[0], estimator=each, chunk=1) for label, each in made.items()}
        return {**self.estimators, **over}


def builtin_names() -> list[str]:
    """The built-in cases."""
    return sorted(path.stem for path in _builtin_folder().glob("*.py") if not path.stem.startswith("_"))


def builtin_titles() -> dict[str, str]:
    """The first line of each built-in case's docstring, read without running it."""
    found = {}
    for name in builtin_names():
        text = ast.get_docstring(ast.parse((_builtin_folder() / f"{name}.py").read_text(encoding="utf-8"))) or ""
        found[name] = _title(text)
    return found


def load(source: str) -> Definition:
    """Load a case by its built-in name or by the path of its file.

    Raises:
        CaseError: there is no such case, or it is not usable; the message says why in one line.

    Example:
        >>> load("quadratic").name
        'quadratic'
    """
    if source in builtin_names():
        return _defined(source, importlib.import_module(f"{cases.__name__}.{source}"))
    path = Path(source).expanduser()
    if path.is_file():
        return _defined(path.stem, _imported(path))
    close = difflib.get_close_matches(source, builtin_names(), n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise CaseError(
        f"there is no case {source!r}: no file of that path, and the built-in cases are "
        f"{', '.join(builtin_names())}.{hint}"
    )


def given(setup: Setup | str, **overrides: Any) -> Definition:
    """The case of a `setup` function, or of a name or path, with what the caller wants otherwise; `baselines` come
    beside the case's own, `engines` may be names, `estimators` may be "all": the case's own and the library's.
    """
    known = {name: value for name, value in overrides.items() if value is not None}
    case = load(setup) if isinstance(setup, str) else None
    if isinstance(known.get("engines"), (list, tuple)):
        known["engines"] = named_engines.named(known["engines"], {} if case is None else case.engines)
    if known.get("estimators") == library.ALL:
        known["estimators"] = library.every(default_estimators() if case is None else case.estimators)
    if not isinstance(setup, str):
        return Definition(**{"name": name_of(setup), "setup": setup, **known})
    assert case is not None, "a name or a path was loaded"
    if "baselines" in known:
        if twice := [label for label in case.baselines if label in known["baselines"]]:
            raise CaseError(
                f"case {case.name}: {twice[0]!r} is one of its BASELINES, and another of that label was asked for "
                f"beside them; give one of the two another label"
            )
        known["baselines"] = {**case.baselines, **known["baselines"]}
    return dataclasses.replace(case, **known)


def _builtin_folder() -> Path:
    return Path(cases.__file__).parent


def _imported(path: Path) -> ModuleType:
    name = f"bilevel_case_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise CaseError(f"{path} is not a Python file: a case file ends in .py")
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as Python does for a script, so that a case may import what lies beside it
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        text = " ".join(str(error).split())
        raise CaseError(f"{path} could not be imported: {type(error).__name__}: {text}{_line(error, path)}") from error
    return module


def _line(error: BaseException, path: Path) -> str:
    """Where in the file it happened."""
    if isinstance(error, SyntaxError):
        return ""  # its text says so
    trace, found = error.__traceback__, 0
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path.resolve()):
            found = trace.tb_lineno
        trace = trace.tb_next
    return f" (line {found})" if found else ""


def _defined(name: str, module: ModuleType) -> Definition:
    if not callable(getattr(module, "setup", None)):
        raise CaseError(
            f"{module.__file__} defines no function setup(device); it must return (problem, outer, inner, batches). "
            f"See python -c 'import bilevel_profiling.cases.case_file as c; help(c)'"
        )
    names = {
        "estimators": "ESTIMATORS",
        "optimizer": "OPTIMIZER",
        "inner_steps": "INNER_STEPS",
        "solvers": "SOLVERS",
        "solution": "SOLUTION",
        "outer_optimizer": "outer_optimizer",
        "batches": "batches",
        "evaluate": "evaluate",
        "outer_steps": "OUTER_STEPS",
        "preload": "PRELOAD",
        "baselines": "BASELINES",
        "engines": "ENGINES",
        "parallel": "PARALLEL",
    }
    found = {field: getattr(module, attribute) for field, attribute in names.items() if hasattr(module, attribute)}
    if "inner_steps" in found:
        steps = found["inner_steps"]
        found["inner_steps"] = tuple(steps) if isinstance(steps, (list, tuple, range)) else (steps,)
    return Definition(name=name, setup=module.setup, title=_title(module.__doc__ or ""), **found)


def _title(docstring: str) -> str:
    return docstring.strip().partition("\n")[0]
