"""A hypergradient by two engines: everything that may be compared, and the assertion that it is the same."""

import warnings

import torch
from torch.utils import _pytree as pytree

import bilevel as bl

GRAPH = bl.Compiled(backend="graph")
SGD = bl.Descent(bl.SGD(0.1), 4)


def call(engine, problem, outer, inner, batches, *, solver=SGD, estimator=None, seed=0, **more):
    """(hypergradient, the state of torch's generator after the call)."""
    torch.manual_seed(seed)
    estimator = estimator or bl.Unrolled("iterates")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="outer variable")
        found = bl.hypergradient(
            problem, outer, inner, batches, solver=solver, estimator=estimator, engine=engine, **more
        )
    return found, torch.get_rng_state()


def leaves(tree):
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def equal(found, wanted, rtol=1e-10):
    """Two hypergradients are one: numbers to `rtol` of the norm of each, structures, status, the oracle calls."""
    for name in ("grad", "inner", "next_inner", "outer_loss", "inner_loss"):
        one, other = getattr(found, name), getattr(wanted, name)
        assert pytree.tree_structure(one) == pytree.tree_structure(other), name
        for a, b in zip(leaves(one), leaves(other), strict=True):
            assert (a.dtype, a.shape, a.requires_grad) == (b.dtype, b.shape, b.requires_grad), name
        _close(one, other, rtol, name)
    assert found.status is wanted.status
    assert found.stats["calls"] == wanted.stats["calls"]
    assert found.stats.keys() - {"engine"} == wanted.stats.keys() - {"engine"}
    _close(found.state.to_dict() if found.state else None, wanted.state.to_dict() if wanted.state else None, 1e-8, "")


def _close(one, other, rtol, name):
    one, other = ([x.double().reshape(-1) for x in leaves(each)] for each in (one, other))
    assert len(one) == len(other)
    if one:
        one, other = torch.cat(one), torch.cat(other)
        assert torch.equal(one.isfinite(), other.isfinite()), name
        one, other = one.nan_to_num(0, 0, 0), other.nan_to_num(0, 0, 0)
        assert (one - other).norm() <= rtol * other.norm() + 1e-300, f"{name}: {one} and {other}"


def same(problem, outer, inner, batches, *, engine=GRAPH, rtol=1e-10, **more):
    """Both engines from the same seed; returns what `engine` found."""
    wanted, drawn = call(None, problem, outer, inner, batches, **more)
    found, drawn_too = call(engine, problem, outer, inner, batches, **more)
    equal(found, wanted, rtol)
    assert torch.equal(drawn, drawn_too), "the generator is elsewhere after the call"
    return found


def traced(found):
    """The functions of a result that were traced for it, by name."""
    return [row["name"] for row in found.stats["engine"]["functions"] if row["new"]]
