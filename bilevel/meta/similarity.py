"""How much adaptation changes what a network computes: distances between activations before and after it.

    X, Y of shape (N, D), columns centered          X = U1 S1 V1', Y = U2 S2 V2', rho: singular values of U1' U2
    cka          1 - |Y'X|_F^2 / (|X'X|_F |Y'Y|_F)
    svcca        1 - mean rho, after a projection of both on the directions that hold 99 % of sum(S)
    pwcca        1 - sum_i alpha_i rho_i      alpha_i ~ sum_j |<i-th canonical variate of X, column j of X>|
    procrustes   1 - |X'Y|_* / (|X|_F |Y|_F)                      |.|_*: sum of singular values
    euclidean    sqrt(1/2 var(X - Y) / (var X + var Y))
    cosine       1 - <X, Y> / (|X|_F |Y|_F)

All lie in [0, 1], cosine in [0, 2]. The first four do not see an orthogonal change of basis of the features; svcca and
pwcca see no invertible one. With too few examples those two find a basis in which anything is alike: below N = D their
similarity is 1 whatever the activations. Hence the rule N >= 10 D, below which they refuse.

Cost: two forwards and, per layer, a decomposition of N x D. No hypergradient.

Reference: Miranda, Wang, Koyejo, Does MAML Only Work via Feature Re-use?, arXiv 2112.13137. Differences: the variance
in `euclidean` is the total over all features; `cosine` is that of the whole matrices; computed in float64.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.adapt import adapt
from bilevel.batches import Batches
from bilevel.functional import functional
from bilevel.inner.base import InnerSolver
from bilevel.meta.evaluation import Evaluation
from bilevel.meta.head import Head
from bilevel.meta.learner import Learner, Outer
from bilevel.space import tree

Distance = Callable[[Tensor, Tensor], Tensor]
"""(X, Y), each of shape (N, D) -> a 0-dim float64 tensor."""
_RULE, _HELD = 10, 0.99


def cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear centered kernel alignment, as a distance.

    Args:
        x: activations, shape (N, D).
        y: those of the same N examples, shape (N, E).

    Raises:
        ValueError: they are no such matrices, have fewer than two rows, or hold something that is not finite.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 3.0]])
        >>> cka(x, x.flip(1))  # the same features in another order
        tensor(0., dtype=torch.float64)
    """
    x, y = _centered(x, y)
    return _one_minus((y.T @ x).square().sum(), _size(x.T @ x) * _size(y.T @ y), _alike(x, y))


def procrustes(x: Tensor, y: Tensor) -> Tensor:
    """Orthogonal Procrustes: what remains after the best orthogonal map, both scaled to norm 1. Arguments as for `cka`.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 3.0]])
        >>> procrustes(x, 2 * x.flip(1)).abs() < 1e-12
        tensor(True)
    """
    x, y = _centered(x, y)
    return _one_minus(torch.linalg.matrix_norm(x.T @ y, "nuc"), _size(x) * _size(y), _alike(x, y))


def svcca(x: Tensor, y: Tensor, *, few: bool = False) -> Tensor:
    """Canonical correlations of the directions that hold 99 % of the sum of singular values, averaged.

    Args:
        x: as for `cka`.
        y: likewise.
        few: take fewer than 10 examples per feature, where the result means little.

    Raises:
        ValueError: as for `cka`, or N < 10 max(D, E) without `few`.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> x, y = torch.randn(2, 400, 4, generator=g)
        >>> svcca(x, x @ x[:4]) < 1e-12, svcca(x, y) > 0.8
        (tensor(True), tensor(True))
    """
    x, y = _centered(x, y, None if few else "svcca")
    (u, s, _), (v, t, _) = (torch.linalg.svd(each, full_matrices=False) for each in (x, y))
    u, v = u[:, : _kept(s, x, _HELD)], v[:, : _kept(t, y, _HELD)]
    if not min(u.shape[1], v.shape[1]):
        return _one_minus(x.new_zeros(()), x.new_zeros(()), _alike(x, y))
    return _one_minus(torch.linalg.svdvals(u.T @ v).mean(), x.new_ones(()))


def pwcca(x: Tensor, y: Tensor, *, few: bool = False) -> Tensor:
    """Canonical correlations, weighted by how much of `x` each canonical variate accounts for. Not symmetric. Arguments
    as for `svcca`.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> x, y = torch.randn(2, 400, 4, generator=g)
        >>> pwcca(x, x @ x[:4]) < 1e-12, pwcca(x, y) > 0.8
        (tensor(True), tensor(True))
    """
    x, y = _centered(x, y, None if few else "pwcca")
    (u, s, _), (v, t, _) = (torch.linalg.svd(each, full_matrices=False) for each in (x, y))
    u, v = u[:, : _kept(s, x)], v[:, : _kept(t, y)]
    if not min(u.shape[1], v.shape[1]):
        return _one_minus(x.new_zeros(()), x.new_zeros(()), _alike(x, y))
    turned, rho, _ = torch.linalg.svd(u.T @ v, full_matrices=False)
    weights = ((u @ turned).T @ x).abs().sum(1)
    return _one_minus((weights * rho).sum(), weights.sum())


def euclidean(x: Tensor, y: Tensor) -> Tensor:
    """Normalized Euclidean distance: sees every change but that of a mean. Arguments as for `cka`, with D = E.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 3.0]])
        >>> euclidean(x, x), euclidean(x, -x)
        (tensor(0., dtype=torch.float64), tensor(1., dtype=torch.float64))
    """
    x, y = _centered(x, y, same=True)
    whole = x.square().sum() + y.square().sum()
    return ((x - y).square().sum() / 2 / torch.where(whole > 0, whole, 1.0)).sqrt()


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """One minus the cosine of the angle between two matrices, taken as vectors. Arguments as for `cka`, with D = E.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 3.0]])
        >>> cosine(x, -x)
        tensor(2., dtype=torch.float64)
    """
    x, y = _centered(x, y, same=True)
    return _one_minus((x * y).sum(), _size(x) * _size(y), _alike(x, y))


def _centered(x: Tensor, y: Tensor, ruled: str | None = None, *, same: bool = False) -> tuple[Tensor, Tensor]:
    """Both in float64 with columns of mean zero; `ruled` is the name of a distance that needs N >= 10 D."""
    shapes = [tuple(each.shape) if isinstance(each, Tensor) else type(each).__name__ for each in (x, y)]
    if any(len(shape) != 2 or 0 in shape for shape in shapes) or shapes[0][0] != shapes[1][0] or shapes[0][0] < 2:
        raise ValueError(
            f"a distance between activations was given {shapes[0]} and {shapes[1]}; two matrices of shape (N, D), a "
            f"row for each of the same N >= 2 examples, were needed. Write x.flatten(1), or one row per position"
        )
    if same and shapes[0] != shapes[1]:
        raise ValueError(
            f"euclidean and cosine compare features one by one, and were given {shapes[0]} and {shapes[1]}; equal "
            f"shapes were needed. Use cka"
        )
    rows, wide = shapes[0][0], max(shapes[0][1], shapes[1][1])
    if ruled is not None and rows < _RULE * wide:
        raise ValueError(
            f"{ruled} was given {rows} examples of {wide} features; at least {_RULE} examples per feature, "
            f"{_RULE * wide}, were needed, because with few it calls anything alike (everything, below {wide}). Give "
            f"more inputs, use cka or procrustes, or write {ruled}(x, y, few=True)"
        )
    if not bool(x.isfinite().all()) or not bool(y.isfinite().all()):
        raise ValueError(
            "a distance between activations was given numbers that are not finite: did the adaptation diverge? Lower "
            "the step size of the solver"
        )
    x, y = x.detach().double(), y.detach().double()
    return _without_mean(x), _without_mean(y)


def _without_mean(x: Tensor) -> Tensor:
    centered = x - x.mean(0)
    # What rounding leaves of a constant feature is none.
    rounding = 1e-12 * x.abs().amax(0)
    return torch.where(centered.abs().amax(0) > rounding, centered, 0.0)


def _kept(singular: Tensor, matrix: Tensor, held: float | None = None) -> int:
    """How many directions hold this share of the sum of singular values; None: all that are not rounding."""
    rank = int((singular > singular[0] * max(matrix.shape) * torch.finfo(matrix.dtype).eps).sum())
    if held is None or not rank:
        return rank
    share = singular.cumsum(0) / singular.sum()
    return min(rank, int((share < held).sum()) + 1)


def _size(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x)


def _alike(x: Tensor, y: Tensor) -> Tensor:
    """Whether both are constant, so that nothing tells them apart."""
    return (_size(x) == 0) & (_size(y) == 0)


def _one_minus(part: Tensor, whole: Tensor, alike: Tensor | None = None) -> Tensor:
    """1 - part / whole, at least 0; without a whole 1, or 0 where both are constant."""
    distance = (1 - part / torch.where(whole > 0, whole, 1.0)).clamp_min(0)
    return distance if alike is None else torch.where(alike, 0.0, distance)


_CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)
OUTPUT = "(output)"
"""The name of the module's own output among the layers."""


@dataclasses.dataclass(frozen=True)
class Reuse:
    """What `reuse` found.

    Attributes:
        layers: the distance at each layer, from the input to the output; the last is "(output)", the module's own. Of
            each the mean over tasks (`score`), the 95 % interval and the value of every task.
        body: the mean over all layers but the output, per task.
    """

    layers: Mapping[str, Evaluation]
    body: Evaluation

    def __str__(self) -> str:
        return "\n".join(f"{name}  {found.score:.3f} +- {found.interval:.3f}" for name, found in self.layers.items())


def reuse(
    learner: Learner,
    outer: Outer,
    loader: Iterable[Batches],
    *,
    distance: Distance = cka,
    layers: Collection[str] | None = None,
    solver: InnerSolver | None = None,
    tasks: int | None = None,
) -> Reuse:
    """Measure how far adaptation moves the features of each layer: small distances mean that they are re-used.

    Every task is adapted to its support; the inputs of its query go through the network before and after.

    Args:
        learner: one in which parameters adapt.
        outer: its x.
        loader: yields `Batches(inner=support, outer=query)` of T tasks; two tasks or more in all.
        distance: between activations. Every position of every example is a row: of images (N, D, H, W), and of (N, D,
            L) behind a convolution or a batch normalization; elsewhere features are the last dimension.
        layers: names of submodules whose outputs are compared; None for those that hold parameters themselves. The
            output of the module is always the last, under the name "(output)".
        solver: another one than at training, for more steps, say.
        tasks: stop after so many.

    Raises:
        ValueError: what adapts is a head; a layer is unknown, is called twice or never, or returns no tensor of two
            dimensions or more; a task's distance is refused (see `cka` and `svcca`); there are fewer than two tasks.

    Example:
        >>> import torch, bilevel as bl
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> anil = bl.meta.Learner(net, nn.functional.mse_loss, adapts="2")
        >>> support = torch.randn(4, 30, 2), torch.randn(4, 30, 1)
        >>> found = reuse(anil, anil.outer(), [bl.Batches(inner=support, outer=support)], distance=euclidean)
        >>> found.layers["0"].score, found.layers["(output)"].score > 0
        (0.0, True)
    """
    if isinstance(learner.adapts, Head):
        raise ValueError(
            f"reuse() was given a learner whose {type(learner.adapts).__name__} adapts in function space: its features "
            f"do not change. Give one in which parameters adapt"
        )
    call, own = functional(learner.module, trainable=True, requires_grad=False)
    watched = _watched(learner.module, layers)
    found = {name: list[float]() for name in [*watched, OUTPUT]}
    learner = learner if solver is None else dataclasses.replace(learner, solver=solver)
    problem, x, codes = learner.problem, tree.detach(outer), []
    assert problem.init is not None, "a learner starts at x"
    for batches in loader:
        adapted = adapt(
            problem,
            x,
            None,
            batches,
            solver=learner.inner_solver,
            tasks=True,
            chunk=learner.chunk,
            evaluate=False,
        )
        codes.append(adapted.code)
        for task in range(len(tree.tensors(adapted.inner)[0])):
            support, inputs, moved = (
                tree.tree_map(lambda leaf, task=task: leaf[task] if isinstance(leaf, Tensor) else leaf, value)
                for value in (batches.inner_at(0), batches.outer[0], adapted.inner)
            )
            with torch.no_grad():
                begun = {**own, **x.get("parameters", {}), **problem.init(x, support)}
                rows = [_activations(call, each, inputs, watched) for each in (begun, {**begun, **moved})]
            for name in found:
                found[name].append(float(distance(rows[0][name], rows[1][name])))
        if tasks is not None and len(found[OUTPUT]) >= tasks:
            break
    nothing = [0.0] * len(found[OUTPUT])
    kept = {name: values[:tasks] for name, values in found.items()}
    inside = [values for name, values in kept.items() if name != OUTPUT]
    means = [sum(each) / len(each) for each in zip(*inside, strict=True)] or nothing[:tasks]
    summed = {name: Evaluation.of(values, nothing[:tasks], codes, wanted=tasks) for name, values in kept.items()}
    return Reuse(summed, Evaluation.of(means, nothing[:tasks], codes, wanted=tasks))


def _watched(module: nn.Module, layers: Collection[str] | None) -> dict[str, nn.Module]:
    """The submodules by name, in the module's order; the last that holds parameters is the output's own."""
    known = dict(module.named_modules())
    if layers is None:
        holding = [name for name, layer in known.items() if name and any(True for _ in layer.parameters(recurse=False))]
        return {name: known[name] for name in holding[:-1]}
    unknown = [name for name in layers if name not in known or not name]
    if isinstance(layers, str) or unknown:
        names = [name for name in known if name]
        raise ValueError(f"reuse() was given layers={layers!r}; names of submodules were needed, of {names}")
    return {name: known[name] for name in known if name in layers}


def _activations(
    call: Callable[..., Any], parameters: dict[str, Tensor], inputs: Any, watched: Mapping[str, nn.Module]
) -> dict[str, Tensor]:
    """What each layer computes, a row for each example (and position)."""
    rows = dict[str, Tensor]()

    def refused(name: str, why: str) -> ValueError:
        return ValueError(
            f"reuse() watches the layer {name!r}, which {why}; a tensor of shape (N, D) or (N, D, ...), once per "
            f"forward, was needed. Leave it out with layers=[...]"
        )

    def keep(name: str, value: Any) -> None:
        if name in rows:
            raise refused(name, "is called twice")
        if not isinstance(value, Tensor) or value.dim() < 2:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise refused(name, f"returns {shape}")
        channels = value.dim() > 3 or isinstance(watched.get(name), _CHANNELS_FIRST)
        value = value.movedim(1, -1) if channels else value
        rows[name] = value.reshape(-1, value.shape[-1])

    handles = [
        layer.register_forward_hook(lambda layer, given, value, name=name: keep(name, value))
        for name, layer in watched.items()
    ]
    try:
        keep(OUTPUT, call(parameters, inputs))
    finally:
        for handle in handles:
            handle.remove()
    for name in watched:
        if name not in rows:
            raise refused(name, "is not called")
    return rows
