"""The public names: documented, with an example, and the same object wherever they are imported from."""

import ast
import enum
import importlib
import importlib.resources
import inspect
import pathlib

import pytest

import bilevel as bl

SOURCE = pathlib.Path(bl.__file__).read_text()
EXPORTS = {
    alias.asname: (node.module, alias.name)
    for node in ast.parse(SOURCE).body
    if isinstance(node, ast.ImportFrom) and node.module != "bilevel"  # which brings a namespace
    for alias in node.names
}
# Named in the design's contract (section 3); tests from outside rely on them.
CONTRACT = [
    "Problem",
    "Batches",
    "PerStep",
    "proximal",
    "hypergradient",
    "set_grad",
    "iterate",
    "Descent",
    "Converge",
    "SGD",
    "Adam",
    "AdamW",
    "CG",
    "Neumann",
    "Unrolled",
    "Implicit",
    "MemoryReduced",
    "FirstOrderCorrected",
    "FirstOrder",
    "TaskMean",
    "functional",
    "Status",
    "Hypergradient",
    "Solution",
    "BilevelError",
]


def test_the_contract_is_exported():
    assert [name for name in CONTRACT if name not in EXPORTS] == []


def test_every_export_is_written_as_a_public_re_export():
    """`from a import B as B`: what type checkers take for public, and no __all__ to keep in step."""
    assert not hasattr(bl, "__all__")
    assert None not in EXPORTS
    assert [name for name, (_, original) in EXPORTS.items() if name != original] == []
    assert [name for name in EXPORTS if name.startswith("_")] == []


def test_nothing_but_exports_and_submodules_is_public():
    public = {name for name in vars(bl) if not name.startswith("_")}
    assert {name for name in public - set(EXPORTS) if not inspect.ismodule(getattr(bl, name))} == set()


def test_exports_are_sorted_by_module():
    modules = [node.module for node in ast.parse(SOURCE).body if isinstance(node, ast.ImportFrom)]
    assert modules == sorted(modules)


@pytest.mark.parametrize("name", EXPORTS)
def test_a_public_name_is_the_object_its_module_defines(name):
    module, original = EXPORTS[name]
    value = getattr(bl, name)
    assert getattr(importlib.import_module(module), original) is value
    assert value.__module__ == module or value.__module__.startswith(module + ".")
    assert getattr(importlib.import_module(value.__module__), name) is value


@pytest.mark.parametrize("name", EXPORTS)
def test_a_public_name_has_a_docstring_with_an_example(name):
    value = getattr(bl, name)
    text = inspect.getdoc(value) or ""
    assert len(text) > 20
    # A dataclass without a docstring gets its signature as one.
    assert not text.startswith(f"{name}(")
    # Contracts and results have no use of their own: the examples of what implements or returns them show them.
    results = (bl.Hypergradient, bl.Solution, bl.LinearSolution, bl.Step)
    if not (
        inspect.isclass(value)
        and (issubclass(value, (Exception, enum.Enum)) or inspect.isabstract(value) or value in results)
    ):
        assert ">>>" in text


@pytest.mark.parametrize("name", [name for name in EXPORTS if inspect.isfunction(getattr(bl, name))])
def test_a_public_function_is_annotated_and_its_docstring_names_its_arguments(name):
    function = getattr(bl, name)
    text = inspect.getdoc(function)
    for argument, parameter in inspect.signature(function).parameters.items():
        assert parameter.annotation is not inspect.Parameter.empty
        assert f"{argument}:" in text


@pytest.mark.parametrize("status", bl.Status)
def test_every_status_is_a_sentence_to_act_on(status):
    assert status.value[0].isupper()
    assert status.value.endswith(".")
    if status is not bl.Status.OK:
        assert len(status.value.split(". ")) >= 2


def test_the_statuses_are_ordered_by_severity():
    assert [status.code for status in bl.Status] == list(range(len(bl.Status)))
    assert [status.failed for status in bl.Status] == sorted(status.failed for status in bl.Status)
    assert not bl.Status.OK.failed
    assert bl.Status.NONFINITE.failed


def test_the_package_says_that_it_is_typed_and_which_version_it_is():
    assert importlib.resources.files("bilevel").joinpath("py.typed").is_file()
    assert all(part.isdigit() for part in bl.__version__.split("."))
