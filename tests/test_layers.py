"""The import rules of the house: data flows one way, and torch alone is needed.

The checker works on source text, so that a planted violation proves that it sees what it should.
"""

import ast
import functools
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "bilevel"

# Lowest first. A module imports from layers below its own; modules of one layer are unaware of each other.
LAYERS = (
    {"_spans", "_strategy", "_tree", "_rng"},
    {"outcome"},
    {"_autodiff", "problem", "functional"},
    {"optim", "linear", "outer"},
    {"oracles", "inner"},
    {"adjoint"},
    {"estimators"},
    {"tasks", "hypergradient"},
    {"iterate"},
    {"problems", "testing", "integrations"},
    {"__init__"},
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
# An inner solver sees a gradient, never a problem; outer optimizers are plain torch optimizers.
UNAWARE = {
    "inner": {"problem", "_autodiff", "linear"},
    "outer": {"optim", "problem", "_autodiff", "estimators", "hypergradient"},
}
# Folders whose files are alternatives to each other: they compose through arguments and share only base.py.
ALTERNATIVES = {"optim", "linear", "inner", "estimators", "tasks", "outer"}
# Who may call which part of torch's differentiation machinery.
DIFFERENTIATION = {
    "torch.autograd": {"_autodiff"},
    "torch.func": {"problem", "functional"},
    "torch.vmap": set(),
    "torch._functorch": set(),
}
FUNC_NAMES = {"problem": {"torch.func.vmap"}, "functional": {"torch.func.functional_call"}}


# Sixty files, looked at once for every planted violation.
parsed = functools.cache(ast.parse)


def sources() -> dict[str, str]:
    """Source of every module by its dotted name below bilevel ("estimators.base"; a package by
    "estimators.__init__")."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text()
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def imports(tree: ast.AST) -> list[str]:
    """Dotted names of everything imported, anywhere in the file; `from a import b` counts as a.b."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names]
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


def module_of(target: str, modules: set[str]) -> str | None:
    """The module of bilevel that an import reaches: the longest known one."""
    parts = target.removeprefix("bilevel").removeprefix(".").split(".")
    for count in range(len(parts), 0, -1):
        name = ".".join(parts[:count])
        if name in modules or f"{name}.__init__" in modules:
            return name
    return None


def violations(modules: dict[str, str]) -> list[str]:
    found, known = [], set(modules)
    for name, source in modules.items():
        tree, top = parsed(source), name.split(".")[0]
        if top not in RANK:
            found.append(f"{name}: in no layer")
            continue
        for target in imports(tree):
            if target.startswith("."):
                found.append(f"{name}: relative import {target}")
            elif within(target, "bilevel_profiling"):
                found.append(f"{name}: imports {target}; the profiler listens, nothing flows back")
            elif within(target, "bilevel"):
                found += _layering(name, target, known)
        at_import = [node for node in _module_level(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
        for target in imports(ast.Module(body=at_import, type_ignores=[])):
            package = target.split(".")[0]
            if package not in {"bilevel", "torch"} and package not in sys.stdlib_module_names:
                found.append(f"{name}: needs {package} when imported; only torch and the standard library may be")
        found += _differentiation(name, tree)
    return found


def _layering(name: str, target: str, known: set[str]) -> list[str]:
    top, reached = name.split(".")[0], module_of(target, known)
    if reached is None:
        return (
            []
            if top in LAYERS[-2]
            else [
                f"{name}: imports {target}, which is no module; inside the package import from the module that defines "
                f"it"
            ]
        )
    other = reached.split(".")[0]
    if other == top:
        alone = name.endswith("__init__") or reached.endswith(".base") or reached == name or top not in ALTERNATIVES
        return [] if alone else [f"{name}: imports its sibling {reached}"]
    if other in UNAWARE.get(top, set()):
        return [f"{name}: {top} is to be unaware of {other}"]
    return [] if RANK[other] < RANK[top] else [f"{name}: imports {reached}, which is not below it"]


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
    for reached in {*used(tree), *imports(tree)}:
        for prefix, allowed in DIFFERENTIATION.items():
            if within(reached, prefix):
                extra = {*FUNC_NAMES.get(name, ()), "torch.func"} if prefix == "torch.func" else None
                if name not in allowed or (extra is not None and reached not in extra):
                    found.append(f"{name}: uses {reached}; derivatives pass through _autodiff alone")
    # Ready problems are users of the library: they may train a model to see what a solution is worth.
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    if name.split(".")[0] not in LAYERS[-2] and any(
        isinstance(call, ast.Attribute) and call.attr == "backward" for call in calls
    ):
        found.append(f"{name}: calls .backward(); derivatives pass through _autodiff alone")
    return found


def test_the_package_keeps_its_import_rules():
    assert violations(sources()) == []


def new_violations(module: str, planted: str) -> list[str]:
    """What is reported once `planted` stands at the end of a module, and was not before."""
    modules = sources()
    before = violations(modules)
    return [
        line for line in violations({**modules, module: modules.get(module, "") + "\n" + planted}) if line not in before
    ]


PLANTED = {
    "a layer reaches up": ("_tree", "from bilevel.outcome import Status", "not below it"),
    "a layer reaches up through a function": (
        "problem",
        "def f():\n    from bilevel.estimators import Unrolled",
        "not below it",
    ),
    "a layer reaches sideways": ("functional", "from bilevel.problem import Problem", "not below it"),
    "optim knows linear": ("optim.sgd", "from bilevel.linear.cg import CG", "not below it"),
    "linear knows optim": ("linear.cg", "import bilevel.optim.sgd", "not below it"),
    "an inner solver knows the problem": ("inner.descent", "from bilevel.problem import Problem", "unaware of problem"),
    "a sibling": ("estimators.implicit", "from bilevel.estimators.unrolled import Unrolled", "its sibling"),
    "a sibling by its package": ("linear.neumann", "from bilevel.linear import CG", "its sibling"),
    "a sibling as a module": ("linear.neumann", "from bilevel.linear import cg", "its sibling"),
    "the public names from inside": ("tasks.mean", "from bilevel import Unrolled", "is no module"),
    "a relative import": ("estimators.implicit", "from . import base", "relative import"),
    "the profiler": ("hypergradient", "from bilevel_profiling import measure", "nothing flows back"),
    "the profiler on demand": (
        "hypergradient",
        "def f():\n    import bilevel_profiling.records.record",
        "nothing flows back",
    ),
    "another package": ("problem", "import numpy as np", "needs numpy"),
    "another package in a class": ("problem", "class A:\n    import scipy.sparse", "needs scipy"),
    "another package that may be missing": (
        "problem",
        "try:\n    import numpy\nexcept ImportError:\n    import pandas",
        "needs pandas",
    ),
    "autograd by attribute": (
        "oracles",
        "import torch\ndef f(a, b):\n    return torch.autograd.grad(a, b)",
        "uses torch.autograd.grad",
    ),
    "autograd by import": ("oracles", "from torch.autograd import grad", "uses torch.autograd.grad"),
    "autograd by name": ("oracles", "from torch import autograd", "uses torch.autograd"),
    "func outside its places": ("oracles", "import torch\nx = torch.func.vmap", "uses torch.func.vmap"),
    "func of another kind in its place": ("problem", "import torch\nx = torch.func.grad", "uses torch.func.grad"),
    "vmap by its short name": ("tasks.mean", "import torch\nx = torch.vmap", "uses torch.vmap"),
    "backward": ("outer.clipped", "def f(loss):\n    loss.backward()", r"calls .backward()"),
    "a file outside every layer": ("helpers", "", "in no layer"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_violation_is_seen(name):
    module, source, message = PLANTED[name]
    found = new_violations(module, source)
    assert len(found) >= 1
    assert all(line.startswith(module + ":") for line in found)
    assert any(message in line for line in found)


ALLOWED = {
    "base.py of the same folder": ("linear.cg", "from bilevel.linear.base import LinearSolver"),
    "a concrete class of another folder": ("estimators.memory_reduced", "from bilevel.linear.cg import CG"),
    "a package on demand": ("problems.glyphs", "def f():\n    import numpy"),
    "a package for types": ("problem", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import numpy"),
    "no_grad": ("oracles", "import torch\nwith torch.no_grad():\n    pass"),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_is_allowed_is_not_reported(name):
    module, source = ALLOWED[name]
    assert new_violations(module, source) == []


def test_the_report_is_a_pure_function_of_records():
    """It imports neither torch nor bilevel, so that records can be shown anywhere."""
    found = []
    for path in sorted((ROOT / "profiling" / "bilevel_profiling" / "report").rglob("*.py")):
        for target in imports(parsed(path.read_text())):
            own = within(target, "bilevel_profiling.report") or within(target, "bilevel_profiling.records.record")
            if target.split(".")[0] in {"torch", "bilevel"} or (within(target, "bilevel_profiling") and not own):
                found.append(f"{path.name}: imports {target}")
    assert found == []


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
    assert pathlib.Path(fresh_import["origin"]).parent == PACKAGE
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
    assert [
        f"{path.relative_to(ROOT)}: {count}" for path in files if (count := len(path.read_text().splitlines())) > 400
    ] == []


def test_folders_that_must_not_be_packages_are_none():
    """Python 3.15's standard library has a package called profiling, on which torch depends."""
    assert not (ROOT / "profiling" / "__init__.py").exists()
    assert list((ROOT / "tests").rglob("__init__.py")) == []
    assert [path for folder in ("bilevel", "profiling", "tests") for path in (ROOT / folder).rglob("profile.py")] == []
