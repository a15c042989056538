"""The import rules of the house: data flows one way, and torch alone is needed.

The checker works on source text, so that a planted violation proves that it sees what it should. Both packages are
checked by it: the library, and the profiler, whose rooms are its folders.
"""

import ast
import dataclasses
import functools
import graphlib
import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class House:
    """A package and its rules. Parts are dotted names below it; a module belongs to the longest that holds it."""

    name: str
    folder: pathlib.Path
    layers: tuple[set[str], ...]
    """Lowest first. A module imports from layers below its own; the parts of one layer are unaware of each other."""
    unaware: Mapping[str, set[str]]
    """Parts that must not know some that lie below them."""
    at_import: Mapping[str, set[str]]
    """Packages besides the standard library that a part may need when it is imported; "" stands for all other parts."""
    users: set[str]
    """Parts that use a package as anybody does, by its public names."""
    alternatives: set[str] = dataclasses.field(default_factory=set)
    """Folders whose files are alternatives to each other: they compose through arguments and share only base.py."""
    shared: set[str] = dataclasses.field(default_factory=set)
    """Other files that alternatives share."""
    free_of: Mapping[str, set[str]] = dataclasses.field(default_factory=dict)
    """Packages that a part imports nowhere, not even inside a function."""
    excepted: Mapping[str, set[str]] = dataclasses.field(default_factory=dict)
    """Modules that may break the rule above, and for which package."""

    @functools.cached_property
    def rank(self) -> dict[str, int]:
        return {part: place for place, layer in enumerate(self.layers) for part in layer}

    def part(self, module: str) -> str | None:
        """The longest listed part that holds a module."""
        return longest(module, self.rank)

    @functools.cached_property
    def sources(self) -> dict[str, str]:
        """Source of every module by its dotted name below the package ("estimators.base"; a package's own file by
        "estimators.__init__")."""
        return {
            ".".join(path.relative_to(self.folder).with_suffix("").parts): path.read_text()
            for path in sorted(self.folder.rglob("*.py"))
        }


LIBRARY = House(
    name="bilevel",
    folder=ROOT / "bilevel",
    layers=(
        {"_strategy", "engine.__init__", "engine.spans"},
        {
            "space",
            "engine.replay",
            "engine.captures",
            "engine.lean",
            "_layout",
        },
        {"engine.block", "engine.offload", "engine.scaling"},
        {"engine.rematerialize"},
        {"outcome", "batches", "checkpointing", "rematerialize", "_blocks"},
        {
            "engine.autodiff",
            "engine.collectives",
            "engine.jacobian",
            "engine.lookup",
            "engine.means",
            "engine.base",
            "engine.cotangents",
            "problem",
            "functional",
        },
        {"engine.together"},
        {"engine.split"},
        {
            "optim",
            "linear",
            "outer",
            "engine.layer",
            "engine.eager",
            "engine.partials",
            "engine.starts",
            "engine.twice",
            "engine.evaluation",
        },
        {"engine.along", "engine.compiled", "engine.shards"},
        {"inner.dynamics", "engine.embedding", "engine.hooked"},
        {"inner.gradient", "engine.linearization", "engine.point"},
        {"inner.base"},
        {"inner", "engine.refusals"},
        {"engine.step_back", "engine.step_forward"},
        {"engine.oracles"},
        {"engine.maps", "engine.gauss_newton"},
        {"engine.again"},
        {"engine.implied", "estimators.state", "estimators.known", "estimators.company"},
        {"estimators.base"},
        {
            "estimators.paths",
            "estimators.admission",
            "estimators.reverse.fixed_point",
            "estimators.reverse.growth",
            "estimators.reverse.plans",
            "estimators.reverse.terms",
            "estimators.bootstrapped.base",
            "estimators.penalty.perturbation",
        },
        {
            "estimators.run",
            "estimators.reverse.auto",
            "estimators.reverse.tape",
            "estimators.reverse.checkpoints",
            "estimators.reverse.sweep",
            "estimators.forward.base",
            "estimators.bootstrapped.targets",
            "estimators.bootstrapped.matchings",
        },
        {"estimators"},
        {"tasks", "hypergradient"},
        {"loop", "adapt", "layer"},
        {"iterate"},
        {"solution"},
        {"data"},
        {"meta"},
        {"distributed"},
        {"problems", "testing", "integrations"},
        {"__init__"},
    ),
    # An inner solver sees a gradient, never a problem; outer optimizers are plain torch optimizers.
    unaware={
        "inner": {"problem", "engine.autodiff", "linear"},
        "outer": {"optim", "problem", "engine", "estimators", "hypergradient"},
    },
    at_import={"": {"torch"}},
    users={"problems", "testing", "integrations"},
    alternatives={"optim", "linear", "inner", "estimators", "tasks", "outer"},
    shared={
        "estimators.implicit.adjoint",
        "inner.history",
        "inner.search.armijo",  # what Newton's method does without being told
        "linear.operator",
        "linear.preconditioned",
        "linear.sketch",
        "linear.system",
        "optim.entrywise",
        "optim.trial",
        "tasks.rows",
        "tasks.together",
    },
    # A byte budget is kept by a forecast; which is asked for inside a function, so that the library does without it.
    excepted={"estimators.reverse.auto": {"bilevel_profiling"}},
)
PROFILER = House(
    name="bilevel_profiling",
    folder=ROOT / "profiling" / "bilevel_profiling",
    layers=(
        {"cases.parallel"},
        {"records", "cases.builtin"},
        {"baselines"},
        {"cases", "meters", "report.content"},
        {"measurement", "report.figures"},
        {"forecasting", "report.terminal", "report.markdown", "report.html", "report.tensorboard"},
        {"report"},
        {"comparison", "testing"},
        {"cli"},
        {"__init__"},
    ),
    # A report is a function of records alone, and who measures does not know who reads; only a comparison writes one.
    unaware={
        "report": {"cases", "meters", "measurement", "forecasting"},
        "measurement": {"report"},
        "forecasting": {"report"},
        "comparison": {"forecasting"},
        "testing": {"cases", "measurement", "forecasting", "report"},
    },
    # Records can be read and shown, and `bilevel --help` answers, without torch.
    at_import={
        "": {"torch", "bilevel"},
        "records": set(),
        "report": set(),
        "cli": set(),
        "__init__": set(),
        "testing": {"pytest"},
    },
    users=set(),
    free_of={"records": {"torch", "bilevel", "rich", "matplotlib", "numpy"}, "report": {"torch", "bilevel"}},
    excepted={"report.tensorboard": {"torch"}},  # torch.utils.tensorboard writes the files
)
# What the profiler knows of the library besides its public names: it listens to spans, walks trees, asks the catalogue
# for all estimators, and says that tensors on the CPU stand for those of a device, which may be offloaded.
PROFILER_SEES = {"engine.spans", "engine.offload", "space.tree", "distributed", "problems", "integrations", "testing"}

# Who may call which part of torch's differentiation machinery.
DIFFERENTIATION = {
    # (The second and the third look at graphs, "layer" and "implied" make nodes; they derive through the first.)
    "torch.autograd": {
        "engine.autodiff",
        "engine.twice",
        "engine.captures",
        "engine.rematerialize",
        "engine.block",
        "engine.lean",
        "engine.scaling",
        "engine.compiled.linear",
        "engine.layer",
        "engine.implied",
        "engine.collectives",
        "engine.shards",
        "engine.hooked",
        "engine.compiled.engine",
    },
    "torch.func": {
        "engine.layer",
        "engine.evaluation",
        "engine.jacobian",
        "engine.rematerialize",
        "engine.compiled.tracing",
    },
    "torch.vmap": set(),
    "torch._functorch": {"engine.compiled.graphs"},
}
FUNC_NAMES = {
    "engine.rematerialize": {"torch.func.vmap"},
    "engine.layer": {"torch.func.vmap"},
    "engine.evaluation": {"torch.func.vmap"},
    "engine.jacobian": {"torch.func.vmap", "torch.func.vjp"},
    "engine.compiled.tracing": {"torch.func.functionalize"},
}


# Two hundred files, looked at once for every planted violation.
parsed = functools.cache(ast.parse)


@dataclasses.dataclass(frozen=True)
class Import:
    """Something imported; `from a import b` counts as a.b, and a relative import as what it reaches."""

    target: str
    written: str
    """As it stands in the file."""


def imports(tree: ast.AST, package: str = "") -> list[Import]:
    """Everything imported, anywhere in the file; `package` is what relative imports start from."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                parts = package.split(".")
                start = ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])
            written = f"{'.' * node.level}{node.module or ''}"
            found += [Import(f"{start}.{alias.name}", f"{written}.{alias.name}") for alias in node.names]
    return found


def used(tree: ast.AST) -> list[str]:
    """Dotted names as they are written in expressions, `torch.autograd.grad` and all its prefixes."""

    def dotted(node: ast.AST) -> str | None:
        if isinstance(node, ast.Name):
            return node.id
        if isinstance(node, ast.Attribute):
            base = dotted(node.value)
            return None if base is None else f"{base}.{node.attr}"
        return None

    return [name for node in ast.walk(tree) if isinstance(node, ast.Attribute) and (name := dotted(node))]


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def longest(name: str, known: Mapping[str, object] | set[str]) -> str | None:
    """The longest of the known dotted names that is `name` or holds it."""
    parts = name.split(".")
    return next((found for count in range(len(parts), 0, -1) if (found := ".".join(parts[:count])) in known), None)


def module_of(house: House, target: str, modules: set[str]) -> str | None:
    """The module that an import reaches: the longest known one, a package by its own name."""
    packages = {name.removesuffix(".__init__") for name in modules if name.endswith(".__init__")}
    return longest(target.removeprefix(house.name).removeprefix("."), modules | packages)


def package_of(house: House, module: str) -> str:
    """What a relative import in a module starts from."""
    return ".".join([house.name, *module.split(".")[:-1]])


def violations(house: House, modules: dict[str, str]) -> list[str]:
    return [line for name, source in modules.items() for line in violations_of(house, name, source, set(modules))]


def violations_of(house: House, name: str, source: str, known: set[str]) -> list[str]:
    """What one module breaks, among the known ones."""
    if house.part(name) is None:
        return [f"{name}: in no layer"]
    found, tree, package = [], parsed(source), package_of(house, name)
    for each in imports(tree, package):
        if each.written.startswith("."):
            found.append(f"{name}: relative import {each.written}; write {each.target}")
        if within(each.target, house.name):
            found += _layering(house, name, each.target, known)
        else:
            found += _outside(house, name, each.target)
    at_import = [node for node in _module_level(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    allowed = house.at_import[longest(name, house.at_import) or ""]
    for each in imports(ast.Module(body=at_import, type_ignores=[]), package):
        top = each.target.split(".")[0]
        if top not in {house.name, *allowed} and top not in sys.stdlib_module_names:
            may = " and ".join(["the standard library", *sorted(allowed)])
            found.append(f"{name}: needs {top} when imported; only {may} may be")
    if house is LIBRARY:
        found += _differentiation(name, tree)
    return found


def _layering(house: House, name: str, target: str, known: set[str]) -> list[str]:
    part, reached = house.part(name), module_of(house, target, known)
    assert part is not None
    if reached is None:
        inside = (
            f"{name}: imports {target}, which is no module; inside the package import from the module that defines it"
        )
        return [] if part in house.users else [inside]
    other = house.part(f"{reached}.__init__" if f"{reached}.__init__" in known else reached)
    if other is None:
        return [f"{name}: imports {reached}, which is in no layer"]
    if other == part:
        free = name.endswith("__init__") or reached == name or reached in house.shared or reached.endswith(".base")
        return [] if free or part not in house.alternatives else [f"{name}: imports its sibling {reached}"]
    forbidden = {each for holder, parts in house.unaware.items() if within(name, holder) for each in parts}
    if (foreign := longest(reached, forbidden)) is not None:
        return [f"{name}: {part} is to be unaware of {foreign}"]
    return [] if house.rank[other] < house.rank[part] else [f"{name}: imports {reached}, which is not below it"]


def _outside(house: House, name: str, target: str) -> list[str]:
    """What one package may know of the other, and which packages a part does without."""
    top = target.split(".")[0]
    if house is LIBRARY and top == PROFILER.name and top not in house.excepted.get(name, set()):
        return [f"{name}: imports {target}; the profiler listens, nothing flows back"]
    if (holder := longest(name, house.free_of)) is not None:
        excepted = house.excepted.get(name, set())
        if top in house.free_of[holder] and top not in excepted:
            return [f"{name}: imports {target}; {holder} does without {top}"]
    if house is PROFILER and top == LIBRARY.name:
        reached = module_of(LIBRARY, target, set(LIBRARY.sources))
        if reached is not None and longest(reached, PROFILER_SEES) is None:
            return [
                f"{name}: imports {target}; of the library it sees public names, and {', '.join(sorted(PROFILER_SEES))}"
            ]
    return []


def _module_level(tree: ast.Module) -> list[ast.stmt]:
    """Statements that run at import: not those inside functions, nor under `if TYPE_CHECKING`."""
    found: list[ast.stmt] = []
    queue = list(tree.body)
    while queue:
        node = queue.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ):
            continue
        found.append(node)
        queue += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
        queue += [
            child for part in ast.iter_child_nodes(node) if isinstance(part, ast.ExceptHandler) for child in part.body
        ]
    return found


def _differentiation(name: str, tree: ast.AST) -> list[str]:
    found = []
    for reached in {*used(tree), *(each.target for each in imports(tree))}:
        for prefix, allowed in DIFFERENTIATION.items():
            if within(reached, prefix):
                extra = {*FUNC_NAMES.get(name, ()), "torch.func"} if prefix == "torch.func" else None
                if name not in allowed or (extra is not None and reached not in extra):
                    found.append(f"{name}: uses {reached}; derivatives pass through engine.autodiff alone")
    # Ready problems are users of the library: they may train a model to see what a solution is worth.
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    if name.split(".")[0] not in LIBRARY.users and any(
        isinstance(call, ast.Attribute) and call.attr == "backward" for call in calls
    ):
        found.append(f"{name}: calls .backward(); derivatives pass through engine.autodiff alone")
    return found


@pytest.mark.parametrize("house", [LIBRARY, PROFILER], ids=lambda house: house.name)
def test_a_package_keeps_its_import_rules(house):
    assert len(house.sources) > 30
    assert violations(house, house.sources) == []


@pytest.mark.parametrize("house", [LIBRARY, PROFILER], ids=lambda house: house.name)
def test_no_modules_import_each_other_in_a_circle(house):
    known = set(house.sources)
    graph = {}
    for name, source in house.sources.items():
        own = [each for each in imports(parsed(source), package_of(house, name)) if within(each.target, house.name)]
        reached = {module_of(house, each.target, known) for each in own} - {None, name.removesuffix(".__init__")}
        graph[name.removesuffix(".__init__")] = reached
    graph.pop("__init__", None)
    graphlib.TopologicalSorter(graph).prepare()  # raises a CycleError that names the circle


def new_violations(house: House, module: str, planted: str) -> list[str]:
    """What is reported of a module once `planted` stands at its end, and was not before."""
    source, known = house.sources.get(module), {*house.sources, module}
    before = violations_of(house, module, source, known) if source is not None else []
    after = violations_of(house, module, f"{source or ''}\n{planted}", known)
    return [line for line in after if line not in before]


PLANTED = {
    "a layer reaches up": ("space.tree", "from bilevel.outcome import Status", "not below it"),
    "a layer reaches up through a function": (
        "problem",
        "def f():\n    from bilevel.estimators import Unrolled",
        "not below it",
    ),
    "a layer reaches sideways": ("functional", "from bilevel.problem import Problem", "not below it"),
    "optim knows linear": ("optim.sgd", "from bilevel.linear.cg import CG", "not below it"),
    "linear knows optim": ("linear.cg", "import bilevel.optim.sgd", "not below it"),
    "an inner solver knows the problem": ("inner.descent", "from bilevel.problem import Problem", "unaware of problem"),
    "a sibling": (
        "estimators.implicit.implicit",
        "from bilevel.estimators.reverse.unrolled import Unrolled",
        "its sibling",
    ),
    "a sibling by its package": ("linear.neumann", "from bilevel.linear import CG", "its sibling"),
    "a sibling as a module": ("linear.neumann", "from bilevel.linear import cg", "its sibling"),
    "the public names from inside": ("tasks.mean", "from bilevel import Unrolled", "is no module"),
    "a relative import": ("estimators.implicit.implicit", "from . import adjoint", "relative import"),
    "a relative import that reaches up": ("linear.cg", "from ..estimators.base import Estimator", "not below it"),
    "a relative import of what it must not know": ("inner.base", "from .. import problem", "unaware of problem"),
    "a relative import of a sibling": ("linear.cg", "from .neumann import Neumann", "its sibling"),
    "a relative import in a package's own file": ("optim.__init__", "from ..inner import Descent", "not below it"),
    "an engine that knows estimators": ("engine.oracles", "import bilevel.estimators.base", "not below it"),
    "a file of the engine outside every layer": ("engine.helpers", "", "in no layer"),
    "the profiler": ("hypergradient", "from bilevel_profiling import measure", "nothing flows back"),
    "the profiler on demand": (
        "hypergradient",
        "def f():\n    import bilevel_profiling.records.record",
        "nothing flows back",
    ),
    "the profiler at once, where it may be asked": (
        "estimators.reverse.auto",
        "import bilevel_profiling",
        "needs bilevel_profiling",
    ),
    "another package": ("problem", "import numpy as np", "needs numpy"),
    "another package in a class": ("problem", "class A:\n    import scipy.sparse", "needs scipy"),
    "another package that may be missing": (
        "problem",
        "try:\n    import numpy\nexcept ImportError:\n    import pandas",
        "needs pandas",
    ),
    "autograd by attribute": (
        "engine.oracles",
        "import torch\ndef f(a, b):\n    return torch.autograd.grad(a, b)",
        "uses torch.autograd.grad",
    ),
    "autograd by import": ("engine.oracles", "from torch.autograd import grad", "uses torch.autograd.grad"),
    "autograd by name": ("engine.oracles", "from torch import autograd", "uses torch.autograd"),
    "func outside its places": ("engine.oracles", "import torch\nx = torch.func.vmap", "uses torch.func.vmap"),
    "func of another kind in its place": ("problem", "import torch\nx = torch.func.grad", "uses torch.func.grad"),
    "vmap by its short name": ("tasks.mean", "import torch\nx = torch.vmap", "uses torch.vmap"),
    "backward": ("outer.clipped", "def f(loss):\n    loss.backward()", r"calls .backward()"),
    "a file outside every layer": ("helpers", "", "in no layer"),
}


PLANTED_IN_THE_PROFILER = {
    "a room reaches up": ("records.sizes", "from bilevel_profiling.meters.base import Meter", "not below it"),
    "a room reaches up through a function": (
        "measurement.passes",
        "def f():\n    from bilevel_profiling.comparison.plan import Plan",
        "not below it",
    ),
    "a room reaches sideways": ("meters.clock", "from bilevel_profiling.cases.case import Case", "not below it"),
    "a relative import that reaches up": ("records.sizes", "from ..cases.case import Case", "not below it"),
    "a relative import of a room": ("meters.clock", "from .. import comparison", "not below it"),
    "a relative import": ("measurement.cell", "from .isolate import run", "relative import"),
    "a relative import of what it must not know": ("report.markdown", "from ..meters import base", "unaware of meters"),
    "a report that measures": (
        "report.html.page",
        "import bilevel_profiling.measurement.passes",
        "unaware of measurement",
    ),
    "sentences that know the page": (
        "report.content.summary",
        "from bilevel_profiling.report.html.tables import tables",
        "not below it",
    ),
    "a case that knows the profiler": (
        "cases.builtin.ridge",
        "from bilevel_profiling.cases.case import Case",
        "not below it",
    ),
    "the public names from inside": ("measurement.loop", "from bilevel_profiling import Case", "is no module"),
    "records with torch": ("records.failure", "import torch", "does without torch"),
    "records with torch on demand": ("records.failure", "def f():\n    import torch", "does without torch"),
    "a report with torch on demand": ("report.content.groups", "def f():\n    import torch", "does without torch"),
    "a report with the library": ("report.html.page", "import bilevel", "does without bilevel"),
    "a report that needs rich": ("report.terminal.table", "import rich", "needs rich"),
    "a command that needs torch at once": ("cli.show", "import torch", "needs torch"),
    "a meter that needs numpy": ("meters.clock", "import numpy", "needs numpy"),
    "the library's inside": ("meters.clock", "from bilevel.engine import autodiff", "public names"),
    "a file outside every room": ("helpers", "", "in no layer"),
}


@pytest.mark.parametrize(
    ("house", "name"), [(LIBRARY, name) for name in PLANTED] + [(PROFILER, name) for name in PLANTED_IN_THE_PROFILER]
)
def test_a_planted_violation_is_seen(house, name):
    module, source, message = (PLANTED if house is LIBRARY else PLANTED_IN_THE_PROFILER)[name]
    found = new_violations(house, module, source)
    assert len(found) >= 1
    assert all(line.startswith(module + ":") for line in found)
    assert any(message in line for line in found)


ALLOWED = {
    "base.py of the same folder": ("linear.cg", "from bilevel.linear.base import LinearSolver"),
    "a concrete class of another folder": ("estimators.implicit.memory_reduced", "from bilevel.linear.cg import CG"),
    "a package on demand": ("problems.glyphs", "def f():\n    import numpy"),
    "a package for types": ("problem", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import numpy"),
    "no_grad": ("engine.oracles", "import torch\nwith torch.no_grad():\n    pass"),
}


ALLOWED_IN_THE_PROFILER = {
    "a room below": ("measurement.loop", "from bilevel_profiling.meters.cuda import Cuda"),
    "the same room": ("measurement.loop", "from bilevel_profiling.measurement.running import number"),
    "a comparison that writes its report": ("comparison.work", "from bilevel_profiling import report"),
    "the library's public names": ("meters.clock", "import bilevel as bl\nfrom bilevel import Unrolled"),
    "the library's spans": ("meters.clock", "from bilevel.engine import spans"),
    "rich on demand": ("report.terminal.table", "def f():\n    from rich.table import Table"),
    "torch on demand": ("cli.show", "def f():\n    import torch"),
}


@pytest.mark.parametrize(
    ("house", "name"), [(LIBRARY, name) for name in ALLOWED] + [(PROFILER, name) for name in ALLOWED_IN_THE_PROFILER]
)
def test_what_is_allowed_is_not_reported(house, name):
    module, source = (ALLOWED if house is LIBRARY else ALLOWED_IN_THE_PROFILER)[name]
    assert new_violations(house, module, source) == []


IMPORT_AND_LOOK = """
import json, logging, os, random, signal, sys, warnings
import torch, torch.func, torch.profiler, torch.utils._pytree

class Blocker:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top not in {"bilevel", "torch"} and top not in sys.stdlib_module_names:
            raise ImportError(f"blocked: {name}")

def state():
    return {
        "torch seed": torch.initial_seed(),
        "torch random state": torch.get_rng_state().tolist(),
        "random state": repr(random.getstate()),
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "grad mode": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "autograd anomaly": torch.is_anomaly_enabled(),
        "warning filters": repr(warnings.filters),
        "showwarning": repr(warnings.showwarning),
        "log handlers": repr(logging.getLogger().handlers),
        "environment": dict(os.environ),
        "path": list(sys.path),
        "excepthook": repr(sys.excepthook),
        "interrupt": repr(signal.getsignal(signal.SIGINT)),
        "recursion": sys.getrecursionlimit(),
    }

before, loaded = state(), set(sys.modules)
sys.meta_path.insert(0, Blocker())
import bilevel
after = state()
changed = [key for key in before if before[key] != after[key]]
print(json.dumps({"changed": changed, "new": sorted(set(sys.modules) - loaded), "origin": bilevel.__file__}))
"""


@pytest.fixture(scope="module")
def fresh_import() -> dict:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORT_AND_LOOK],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_bilevel_needs_torch_and_the_standard_library_alone(fresh_import):
    assert pathlib.Path(fresh_import["origin"]).parent == LIBRARY.folder
    tops = {name.split(".")[0] for name in fresh_import["new"]}
    assert {top for top in tops if top not in sys.stdlib_module_names} <= {"bilevel", "torch"}


def test_importing_bilevel_loads_no_problems_no_integrations_and_no_profiler(fresh_import):
    on_demand = ("bilevel.problems", "bilevel.testing", "bilevel.integrations", "bilevel_profiling")
    assert [name for name in fresh_import["new"] if any(within(name, prefix) for prefix in on_demand)] == []


def test_importing_bilevel_changes_no_global_state(fresh_import):
    assert fresh_import["changed"] == []


def test_no_file_is_longer_than_four_hundred_lines():
    files = [path for folder in ("bilevel", "profiling") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 20
    long = {str(path.relative_to(ROOT)) for path in files if len(path.read_text().splitlines()) > 400}
    assert long == set()


def test_folders_that_must_not_be_packages_are_none():
    """Python 3.15's standard library has a package called profiling, on which torch depends."""
    assert not (ROOT / "profiling" / "__init__.py").exists()
    assert list((ROOT / "tests").rglob("__init__.py")) == []
    assert [path for folder in ("bilevel", "profiling", "tests") for path in (ROOT / folder).rglob("profile.py")] == []
