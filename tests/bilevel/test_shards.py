"""An inner variable that is sharded over ranks: every hypergradient is that of one process, or is refused."""

import functools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import bilevel as bl
from bilevel import testing
from bilevel.distributed import Ranks

D = torch.float64
G = torch.Generator().manual_seed(0)
X = {"a": torch.randn(3, generator=G, dtype=D), "decay": torch.tensor(-1.0, dtype=D)}
Y = {
    "w": torch.randn(5, 3, generator=G, dtype=D),
    "b": torch.randn(3, generator=G, dtype=D),
    "s": torch.tensor(0.4, dtype=D),
    "v": torch.randn(2, 6, generator=G, dtype=D),
}
FEW, ALL = "wb", "wbsv"
PLACES = {"w": Shard(0), "b": Replicate(), "s": Replicate(), "v": Shard(1)}
BATCH = {"rows": torch.randn(4, 5, generator=G, dtype=D), "goal": torch.randn(2, 6, generator=G, dtype=D)}


def inner_loss(y: Any, x: Any, batch: Any) -> Tensor:
    hidden = batch["rows"] @ y["w"] + y["b"]
    fit = ((hidden - x["a"]).square().mean() + 0.1 * (hidden * y["s"] if "s" in y else hidden).sin().mean()) / 2
    loss = fit + 0.3 * x["decay"].exp() * sum(leaf.square().sum() for leaf in y.values())
    return loss + 0.2 * (y["v"] - batch["goal"]).square().sum() if "v" in y else loss


def outer_loss(y: Any, x: Any, batch: Any) -> Tensor:
    loss = (batch["rows"] @ y["w"]).square().mean() + x["a"].square().sum() * y["b"].sum().tanh()
    return loss + (y["v"] * y["s"]).tanh().sum() if "v" in y else loss


def spread(value: dict[str, Tensor], mesh: DeviceMesh, places: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        name: distribute_tensor(leaf, mesh, [places[name] if places else Replicate()]) for name, leaf in value.items()
    }


def whole(value: Any) -> Any:
    return {name: leaf.full_tensor() if isinstance(leaf, DTensor) else leaf for name, leaf in value.items()}


SGD = bl.Descent(bl.SGD(0.2), 3)
CHOICES: dict[str, tuple[Any, Any]] = {
    **{entry.label: (entry.usual, SGD) for entry in testing.ENTRIES if entry.label != "first order"},
    "implicit neumann": (bl.Implicit(bl.Neumann(steps=4, step_size=0.5)), SGD),
    "levenberg-marquardt": (bl.Implicit(bl.linear.LevenbergMarquardt(bl.linear.LSMR(3), attempts=2)), SGD),
    "converge": (bl.Implicit(bl.CG(4)), bl.Converge(bl.SGD(0.2), tol=0.2, max_steps=20)),
    "adam": (bl.Unrolled(), bl.Descent(bl.Adam(0.05, weight_decay=0.1), 3)),
    "learned rate": (bl.Unrolled(), bl.Descent(bl.SGD(lr=lambda x: 0.1 * x["decay"].exp(), momentum=0.5), 3)),
    "learned decay": (
        bl.Implicit(bl.CG(4)),
        bl.Descent(bl.SGD(0.2, weight_decay=lambda x: x["decay"].exp()), 3),
    ),
    "learned betas": (
        bl.Unrolled(),
        bl.Descent(bl.Adam(0.05, betas=(lambda x: 0.5 + 0.1 * x["decay"].tanh(), 0.9)), 3),
    ),
    "groups": (bl.FirstOrderCorrected(0.01), bl.Descent(bl.optim.Groups({"w": bl.SGD(0.1), "": bl.SGD(0.2)}), 3)),
    "lbfgs": (bl.Implicit(bl.CG(4)), bl.Descent(bl.inner.LBFGS(memory=3, search=bl.inner.Armijo()), 3)),
    "newton": (bl.Implicit(bl.CG(4)), bl.Descent(bl.inner.Newton(bl.CG(12)), 2)),
    "averaged": (bl.Unrolled(), bl.Descent(bl.inner.Averaged(bl.SGD(0.2), decay=0.5), 3)),
    "clipped by value": (bl.Unrolled(), bl.Descent(bl.optim.ClippedByValue(bl.SGD(0.2), 0.3), 3)),
}
REFUSED: dict[str, tuple[Any, Any]] = {
    "muon": (bl.Unrolled(), bl.Descent(bl.optim.Muon(0.1), 2)),
    "clipped by norm": (bl.Unrolled(), bl.Descent(bl.optim.ClippedByNorm(bl.SGD(0.2), 1.0), 2)),
    "of torch": (bl.Unrolled(), bl.Descent(bl.optim.FromTorch(torch.optim.SGD, lr=0.1), 2)),
    "groups by shape": (
        bl.Unrolled(),
        bl.Descent(bl.optim.Groups([(lambda name, shape: len(shape) > 1, bl.SGD(0.1)), ("", bl.SGD(0.2))]), 2),
    ),
    "langevin": (bl.Unrolled(), bl.Descent(bl.inner.Langevin(0.1, temperature=0.1), 2)),
    "unrolled lbfgs": (bl.Unrolled(), bl.Descent(bl.inner.LBFGS(memory=3), 3)),
    "preconditioned": (bl.Implicit(bl.CG(3, preconditioner=bl.linear.Jacobi())), SGD),
    "preconditioned by a function": (bl.Implicit(bl.CG(3, preconditioner=lambda r: r)), SGD),
    "tasks": (bl.TaskMean(bl.Unrolled()), SGD),
}
LABELS = ("graph", "implicit cg", "corrected", "sama", "learned rate")


def estimate(estimator: Any, solver: Any, mesh: DeviceMesh | None, leaves: str) -> dict[str, Any]:
    """Two calls, the second with what the first carries."""
    warnings.simplefilter("ignore")
    x, y, batch = X, {name: Y[name] for name in leaves}, BATCH
    if mesh is not None:
        x, y, batch = spread(X, mesh), spread(y, mesh, PLACES), spread(BATCH, mesh)
    torch.manual_seed(0)
    problem, state, codes = bl.Problem(inner_loss, outer_loss), None, []
    found = None
    for _ in range(2):
        if found is not None and state is None and found.next_inner is None:
            break
        found = bl.hypergradient(
            problem, x, y, bl.Batches(batch, batch), solver=solver, estimator=estimator, state=state
        )
        state, y = found.state, found.inner if found.next_inner is None else found.next_inner
        codes.append(found.status.name)
    figures = {key: float(found.stats[key]) for key in ("inner_residual", "linear_residual") if key in found.stats}
    return {
        **{f"grad {key}": leaf for key, leaf in whole(found.grad).items()},
        **{f"inner {key}": leaf for key, leaf in whole(found.inner).items()},
        **{f"next {key}": leaf for key, leaf in whole(y).items()},
        "outer": found.outer_loss,
        "inner": found.inner_loss,
        "codes": codes,
        **figures,
    }


def attempt(estimator: Any, solver: Any, mesh: DeviceMesh | None, leaves: str) -> Any:
    try:
        return estimate(estimator, solver, mesh, leaves)
    except (ValueError, TypeError, bl.BilevelError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


def mesh_of(ranks: Ranks) -> DeviceMesh:
    return DeviceMesh.from_group(ranks.group, "cpu")


def attempts(ranks: Ranks, labels: tuple[str, ...], leaves: str) -> dict[str, Any]:
    mesh, every = mesh_of(ranks), CHOICES | REFUSED
    return {label: attempt(*every[label], mesh, leaves) for label in labels}


@functools.cache
def alone(label: str, leaves: str) -> Any:
    return estimate(*CHOICES[label], None, leaves)


def assert_same(found: dict[str, Any], label: str, leaves: str) -> None:
    expected = alone(label, leaves)
    assert found["codes"] == expected["codes"], label
    # A quotient by a radius or by nu has its rounding errors divided, too.
    loose = 1e-8 if label in ("corrected forward", "fdehbo") else 1e-10
    for name in expected.keys() - {"codes"}:
        torch.testing.assert_close(found[name], expected[name], rtol=loose, atol=loose, msg=f"{label}: {name}")


def test_every_estimator_solver_and_optimizer_is_right_on_parts_or_refused(ranks: Any) -> None:
    first, second = ranks.run(2, attempts, (*CHOICES, *REFUSED), FEW)
    right = set()
    for label, found in first.items():
        assert isinstance(found, str) == isinstance(second[label], str)
        if isinstance(found, str):
            assert "sharded over processes" in found, f"{label}: {found}"
            continue
        assert_same(found, label, FEW)
        assert_same(second[label], label, FEW)
        right.add(label)
    assert not right & REFUSED.keys()
    refused = {entry.label for entry in testing.ENTRIES} - right
    assert refused == {
        *("first order", "revolve", "forward", "forward gradient", "forward gradient, normal", "gamma decay"),
        *("gamma decay, running", "implicit bicgstab", "implicit dense", "implicit cg, nystrom preconditioner"),
        *("gauss-newton", "reversible", "evolution", "persistent evolution", "partial zeroth order", "bootstrapped"),
        *("probed",),
    } & {entry.label for entry in testing.ENTRIES}


@pytest.mark.parametrize("count", [1, 4])
def test_parts_may_be_uneven_or_empty(ranks: Any, count: int) -> None:
    for found in ranks.run(count, attempts, LABELS, ALL):
        for label in LABELS:
            assert not isinstance(found[label], str), found[label]
            assert_same(found[label], label, ALL)


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.GELU(), torch.nn.Linear(7, 3)).double()


def weighted(module: Any, x: Any, batch: Any) -> Tensor:
    losses = torch.nn.functional.cross_entropy(module(batch["rows"]), batch["labels"], reduction="none")
    return (x["weights"][batch["index"]].sigmoid() * losses).mean() + 0.01 * sum(p.square().sum() for p in x.values())


def clean(module: Any, x: Any, batch: Any) -> Tensor:
    return torch.nn.functional.cross_entropy(module(batch["rows"]), batch["labels"])


def fsdp_data(part: slice = slice(None)) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(16, 5, generator=generator, dtype=D)
    labels = torch.randint(0, 3, (16,), generator=generator)
    index = torch.arange(8)
    inner = {"rows": rows[:8][part], "labels": labels[:8][part], "index": index[part]}
    outer = {"rows": rows[8:][part], "labels": labels[8:][part]}
    return {"weights": torch.linspace(-1, 1, 8, dtype=D)}, bl.Batches(inner, outer)


FIRST = {
    "corrected": bl.FirstOrderCorrected(0.01),
    "sama": bl.estimators.Sama(),
    "darts": bl.estimators.Darts(),
    "pbgd": bl.estimators.PBGD(2.0),
}


def fsdp(ranks: Ranks, split: bool) -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard

    warnings.simplefilter("ignore")
    mesh, module, found = mesh_of(ranks), net(), {}
    for layer in (module[0], module[2], module):
        fully_shard(layer, mesh=mesh)
    x, batches = fsdp_data(slice(ranks.rank, None, ranks.size) if split else slice(None))
    inner_loss, outer_loss = (bl.distributed.fully_sharded(module, loss) for loss in (weighted, clean))
    problem, before = bl.Problem(inner_loss, outer_loss), [p.full_tensor().clone() for p in module.parameters()]
    y = dict(module.named_parameters())
    for name, estimator in FIRST.items():
        hg = bl.hypergradient(problem, x, y, batches, solver=bl.Descent(bl.SGD(0.3), 4), estimator=estimator)
        found[name] = {"x": hg.grad["weights"], **whole(hg.inner), "f": hg.outer_loss, "g": hg.inner_loss}
    for a, b in zip(before, module.parameters(), strict=True):
        assert torch.equal(a, b.full_tensor()), "the module's own parameters moved"
        assert b.grad is None
    for name, estimator in {"unrolled": bl.Unrolled(), "implicit": bl.Implicit(bl.CG(2))}.items():
        try:
            bl.hypergradient(problem, x, y, batches, solver=bl.Descent(bl.SGD(0.3), 2), estimator=estimator)
        except bl.NotTwiceDifferentiableError as error:
            found[name] = str(error)
    return found


@functools.cache
def fsdp_alone() -> dict[str, Any]:
    warnings.simplefilter("ignore")
    call, y = bl.functional(net())
    x, batches = fsdp_data()
    problem, found = (
        bl.Problem(*(lambda y, x, b, f=f: f(lambda rows: call(y, rows), x, b) for f in (weighted, clean))),
        {},
    )
    for name, estimator in FIRST.items():
        hg = bl.hypergradient(problem, x, y, batches, solver=bl.Descent(bl.SGD(0.3), 4), estimator=estimator)
        found[name] = {"x": hg.grad["weights"], **hg.inner, "f": hg.outer_loss, "g": hg.inner_loss}
    return found


@pytest.mark.parametrize(("count", "split"), [(2, True), (4, False), (4, True)])
def test_a_fully_sharded_module_has_the_hypergradients_of_the_module(ranks: Any, count: int, split: bool) -> None:
    for found in ranks.run(count, fsdp, split):
        for name, expected in fsdp_alone().items():
            for key, leaf in expected.items():
                torch.testing.assert_close(found[name][key], leaf, rtol=1e-10, atol=1e-10, msg=f"{name}: {key}")
        for name in ("unrolled", "implicit"):
            assert "FirstOrderCorrected()" in found[name]


def refusals(ranks: Ranks) -> dict[str, str]:
    mesh, found = mesh_of(ranks), {}
    x, y, batch = spread(X, mesh), spread(Y, mesh, PLACES), spread(BATCH, mesh)
    problem, batches = bl.Problem(inner_loss, outer_loss), bl.Batches(batch, batch)

    def refused(name: str, **changed: Any) -> None:
        given = {
            "problem": problem,
            "outer": x,
            "inner": y,
            "batches": batches,
            "solver": SGD,
            "estimator": bl.Unrolled(),
        }
        try:
            given |= changed
            bl.hypergradient(**given)
            found[name] = "nothing was raised"
        except (ValueError, TypeError, RuntimeError) as error:
            found[name] = str(error)

    mixed = {**y, "b": Y["b"]}
    refused("a plain tensor beside DTensors", inner=mixed)
    refused("sharded outer", outer={**x, "a": distribute_tensor(X["a"], mesh, [Shard(0)])})
    refused("another x on each rank", outer={"a": X["a"] + ranks.rank, "decay": X["decay"]})
    refused("init", problem=bl.Problem(inner_loss, outer_loss, init=lambda x, b: y), inner=None)
    refused("init and inner", problem=bl.Problem(inner_loss, outer_loss, init=lambda x, b: y))
    refused("compiled", engine=bl.Compiled())
    own = bl.Problem(lambda y, x, b: _Cube.apply(y["w"]).full_tensor().sum() + inner_loss(y, x, b), outer_loss)
    refused("an operator of the user's", problem=own)

    def by_rank(y: Any, x: Any, b: Any) -> Tensor:
        whole = bl.distributed.gathered(y)
        return ((1 + ranks.rank) * whole["w"].square().sum() + sum(leaf.square().sum() for leaf in whole.values())) * x[
            "a"
        ].exp().sum()

    refused("another loss on each rank", problem=bl.Problem(by_rank, by_rank), outer=X)
    try:
        bl.solution(problem, x, y, batches, solver=SGD, estimator=bl.Unrolled())
    except (ValueError, TypeError) as error:
        found["another entry point"] = str(error)
    return found


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Any) -> Any:
        ctx.save_for_backward(value)
        return value**3

    @staticmethod
    def backward(ctx: Any, cotangent: Any) -> Any:
        (value,) = ctx.saved_tensors
        return 3 * value**2 * cotangent


SAID = {
    "a plain tensor beside DTensors": "['b']",
    "sharded outer": "must be whole on every rank",
    "another x on each rank": "differ between the ranks",
    "init": "one start too many|plain|init",
    "init and inner": "leave init out",
    "compiled": "bilevel.Eager()",
    "an operator of the user's": "_CubeBackward",
    "another loss on each rank": "differ between the ranks",
    "another entry point": "DTensor",
}


def test_what_cannot_be_right_is_refused_in_words(ranks: Any) -> None:
    for found in ranks.run(2, refusals):
        for name, words in SAID.items():
            assert any(word in found.get(name, "nothing") for word in words.split("|")), f"{name}: {found.get(name)}"


def by_gathering(ranks: Ranks) -> dict[str, Any]:
    """Losses of plain tensors from gathered weights, by layers that gather inside rematerialized blocks."""
    warnings.simplefilter("ignore")
    mesh, found = mesh_of(ranks), {}
    x, batches = fsdp_data()
    y = {name: distribute_tensor(leaf, mesh, [Shard(0)]) for name, leaf in bl.functional(net())[1].items()}
    first = bl.rematerialize(lambda h, w, b: torch.nn.functional.gelu(torch.nn.functional.linear(h, *gather(w, b))))
    second = bl.rematerialize(lambda h, w, b: torch.nn.functional.linear(h, *gather(w, b)))

    def gather(*leaves: Any) -> Any:
        return bl.distributed.gathered(list(leaves))

    def call(y: Any, rows: Tensor) -> Tensor:
        return second(first(rows, y["0.weight"], y["0.bias"]), y["2.weight"], y["2.bias"])

    problem = bl.Problem(*(lambda y, x, b, f=f: f(lambda rows: call(y, rows), x, b) for f in (weighted, clean)))
    for name, estimator in {**FIRST, "unrolled": bl.Unrolled(), "implicit": bl.Implicit(bl.CG(5))}.items():
        hg = bl.hypergradient(problem, x, y, batches, solver=bl.Descent(bl.SGD(0.3), 4), estimator=estimator)
        found[name] = {"x": hg.grad["weights"], **whole(hg.inner), "f": hg.outer_loss, "g": hg.inner_loss}
    return found


def test_gathered_weights_are_differentiated_twice_inside_rematerialized_blocks(ranks: Any) -> None:
    expected = dict(fsdp_alone())
    call, y = bl.functional(net())
    x, batches = fsdp_data()
    problem = bl.Problem(*(lambda y, x, b, f=f: f(lambda rows: call(y, rows), x, b) for f in (weighted, clean)))
    for name, estimator in {"unrolled": bl.Unrolled(), "implicit": bl.Implicit(bl.CG(5))}.items():
        hg = bl.hypergradient(problem, x, y, batches, solver=bl.Descent(bl.SGD(0.3), 4), estimator=estimator)
        expected[name] = {"x": hg.grad["weights"], **hg.inner, "f": hg.outer_loss, "g": hg.inner_loss}
    for found in ranks.run(3, by_gathering):
        for name, values in expected.items():
            for key, leaf in values.items():
                torch.testing.assert_close(found[name][key], leaf, rtol=1e-9, atol=1e-10, msg=f"{name}: {key}")
