"""Betty's own methods as baselines: a Betty program made of the same losses, variables, data and random numbers.

    lower problem: y, training_step = g, K steps of the torch optimizer that equals ours, best-response method of Config
    upper problem: x, training_step = f, whose optimizer step is caught: what it would use is the hypergradient

One call builds the two problems and an Engine and runs it for K lower steps, the last of which starts the upper one.
Betty itself computes everything; this module keeps its words off the terminal and holds no tensor that a Betty program
would not hold: x is not copied, y is copied once where Betty moves it in place.

Where Betty does not run as released, or runs into a wall that says nothing about its method, it is mended in a subclass
(`betty_program.MENDED`), and the row says so. Where Betty is wrong (its CG), it is left wrong, and the row says so.

| method | products with the Hessian | takes the inverse Hessian for |
| --- | --- | --- |
| cg | iterations | CG's answer (its recursion uses the old residual in the direction) |
| neumann | iterations | alpha (1 + (I - alpha H) + .. + (I - alpha H)^iterations): one term more than iterations |
| darts | 0 (two gradients of g) | the identity; central difference of length darts_alpha / norm of df/dy |
| sama | 0 (two gradients of g) | the identity for SGD, for Adam the derivative of its last step; central difference |
| unrolled | K, by backpropagation | - |

None of them sees the weight decay of the optimizer in the Hessian, and only `unrolled` sees the start.

Reference: Choe et al. 2023, Betty: An Automatic Differentiation Library for Multilevel Optimization, arXiv 2207.02849;
SAMA: Choe et al. 2023, arXiv 2310.05674. Releases 0.2.1 and 0.1.1 (which has no sama) of betty-ml.
"""

import dataclasses
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch

import bilevel as bl
from bilevel.integrations.betty import release as releases
from bilevel.space import tree
from bilevel_profiling.baselines import betty_program as program
from bilevel_profiling.baselines.baseline import Baseline
from bilevel_profiling.records.record import Target

WITHOUT_DECAY = "Its Hessian is that of the loss alone, without the weight decay of the inner optimizer."
ENGINE = "Its time includes building Betty's Engine, about half a millisecond, once a call."


def methods() -> frozenset[str]:
    """The names of the methods that the installed release has.

    Raises:
        ImportError: betty-ml is not installed.
    """
    return program.classes().methods


@dataclasses.dataclass(frozen=True, repr=False)
class Method:
    """One of Betty's best-response methods with its settings; best made by `cg()`, `neumann()`, ...

    `settings` are fields of Betty's `Config` of the lower problem; None stands for the inner step size.
    """

    name: str
    settings: tuple[tuple[str, Any], ...] = ()

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{name}={value}' for name, value in self.settings)})"

    def config(self, rate: float) -> dict[str, Any]:
        """The fields of Config, for an inner step size."""
        return {name: rate if value is None else value for name, value in self.settings}


def cg(iterations: int = 10, alpha: float = 1.0) -> Method:
    """Betty's conjugate gradients, always with `iterations` products; `alpha` multiplies the Hessian products."""
    return Method("cg", (("cg_iterations", iterations), ("cg_alpha", alpha)))


def neumann(iterations: int = 10, alpha: float | None = None) -> Method:
    """Betty's Neumann series: `iterations` products, one term more; `alpha` None is the inner step size."""
    return Method("neumann", (("neumann_iterations", iterations), ("neumann_alpha", alpha)))


def darts(alpha: float = 0.01) -> Method:
    """Betty's finite difference along df/dy, with the identity for the inverse Hessian."""
    return Method("darts", (("darts_alpha", alpha),))


def sama(alpha: float = 1.0) -> Method:
    """Betty's finite difference along df/dy preconditioned by Adam; 1.0 is the length that its Config proposes."""
    return Method("sama", (("sama_adam_alpha", alpha),))


def unrolled() -> Method:
    """Betty's IterativeProblem: backpropagation through the K steps."""
    return Method("unrolled")


def baseline(method: Method) -> Baseline:
    """A method with settings of your own as a row of a comparison.

    Raises:
        ImportError: betty-ml is not installed.

    Example:
        >>> neumann(iterations=5, alpha=0.1)  # BASELINES = {"betty neumann, 5": baseline(neumann(5, 0.1))} in a case
        neumann(neumann_iterations=5, neumann_alpha=0.1)
    """
    release = releases.installed()
    if method.name == "unrolled":
        sees, target, notes = {bl.Path.INNER_LOSS, bl.Path.OUTER_LOSS, bl.Path.START}, Target.PROGRAM, [program.MENDED]
    else:
        sees, target, notes = {bl.Path.INNER_LOSS, bl.Path.OUTER_LOSS}, None, [WITHOUT_DECAY]
        if method.name in ("neumann", "cg") and method.name not in release.defects:
            target = Target.SOLUTION
        notes += [text for name, text in release.defects.items() if name == method.name]
    return Baseline(
        functools.partial(hypergradient_with_betty, method=method),
        package="betty-ml",
        version=release.version,
        target=target,
        notes=(*notes, ENGINE),
        sees=frozenset(sees),
    )


def baselines() -> dict[str, Baseline]:
    """Each of Betty's methods by its label: "betty cg", "betty neumann", "betty darts", "betty sama" (in the releases
    that have it) and "betty unrolled".

    cg and neumann make ten products, neumann with the inner step size; darts and sama perturb by the lengths that
    Betty's Config proposes. `baseline(neumann(iterations=3))` makes others.

    Raises:
        ImportError: betty-ml is not installed.
    """
    every = (cg(), neumann(), darts(), sama(), unrolled())
    return {f"betty {method.name}": baseline(method) for method in every if method.name in methods()}


def hypergradient_with_betty(
    problem: bl.Problem,
    outer: Any,
    inner: Any,
    batches: bl.Batches,
    solver: bl.InnerSolver,
    method: Method,
) -> bl.Hypergradient:
    """The hypergradient that Betty's `method` computes.

    Args:
        problem: the two losses.
        outer: x, a tree of tensors; not changed.
        inner: y_0, a tree of tensors; not changed. None if the problem has `init`.
        batches: the data; `PerStep` gives each step its own. The method takes its derivatives at the last step's batch,
            or at `Batches.curvature`.
        solver: Descent with SGD or Adam of plain numbers (unrolled) or AdamW as well (the others), at least one step.
        method: `cg()`, `neumann()`, `darts()`, `sama()` or `unrolled()`.

    Returns:
        The hypergradient like outer, y_K, both losses. DIVERGED where y_K is not finite, NONFINITE where something else
        is not.

    Raises:
        ImportError: betty-ml is not installed.
        ValueError: Betty has no such solver or method, or cannot take the products that the method needs.

    Example:
        >>> import torch, bilevel as bl
        >>> problem = bl.Problem(lambda y, x, b: ((y - x) ** 2).sum(), lambda y, x, b: (y**2).sum() / 2)
        >>> args = problem, torch.ones(2), torch.zeros(2), bl.Batches(None, None), bl.Descent(bl.SGD(lr=0.25), steps=2)
        >>> if releases.available():
        ...     assert hypergradient_with_betty(*args, unrolled()).grad.tolist() == [0.5625, 0.5625]
        ...     assert hypergradient_with_betty(*args, neumann(1)).grad.tolist() == [0.5625, 0.5625]
    """
    classes = program.classes()
    if method.name not in classes.methods:
        raise ValueError(f"the installed release of betty-ml has no {method.name}; 0.2.1 is the one with all of them")
    rate = _plain(solver, method)
    by_steps = method.name == "unrolled"
    device = tree.tensors(outer)[0].device
    with program.quiet(), torch.enable_grad(), program.placed_on(device):
        upper = program.Held([leaf.detach() for leaf in tree.tensors(outer)])
        call = program.Call(problem, outer, batches, solver.max_steps, inner)
        call.xs, call.begins_at_solution = list(upper.leaves), method.name in ("cg", "neumann")
        call.start = _start(call, inner, follow=by_steps)
        lower = program.Held([leaf.detach().clone() for leaf in tree.tensors(call.start)])
        kind = classes.steps if by_steps else classes.solution
        # What a user of Betty would write. The graph of f is used twice, for the direct part and for df/dy.
        upper_config = classes.config(first_order=not by_steps, retain_graph=not by_steps)
        lower_config = classes.config(
            type="darts" if by_steps else method.name,
            unroll_steps=solver.max_steps,
            retain_graph=by_steps,
            **method.config(rate),
        )
        problems = [
            classes.upper(
                name="upper",
                config=upper_config,
                module=upper,
                optimizer=torch.optim.SGD(upper.parameters(), lr=0.0),
                train_data_loader=[(0,)],
                **classes.placed(device),
            ),
            kind(
                name="lower",
                config=lower_config,
                module=lower,
                optimizer=_optimizer(solver, lower.parameters()),
                train_data_loader=[(step,) for step in range(solver.max_steps)],
                **classes.placed(device),
            ),
        ]
        for each in problems:
            each.call = call
        up, low = problems
        low.moved_by = solver.dynamics.update
        try:
            engine = classes.engine(
                config=classes.engine_config(
                    train_iters=solver.max_steps, valid_step=solver.max_steps + 1, **classes.strategy(device)
                ),
                problems=problems,
                dependencies={"u2l": {up: [low]}, "l2u": {low: [up]}},
            )
            with program.explained(call, method.name):
                engine.run()
            moved = call.like_start([leaf.detach() for leaf in low.trainable_parameters()])
        finally:
            for each in problems:  # they refer to each other, and would hold every tensor until a collection
                vars(each).clear()
        return _result(call, moved)


def _start(call: program.Call, inner: Any, *, follow: bool) -> Any:
    """y_0: what was given, or what init returns, with its graph where that is followed."""
    if call.problem.init is None:
        return tree.detach(inner)
    begun = call.problem.init(tree.like(call.outer, list(call.xs)), call.batches.inner_at(0))
    return begun if follow else tree.detach(begun)


def _result(call: program.Call, moved: Any) -> bl.Hypergradient:
    xs = [leaf.detach() for leaf in call.xs]
    grad = [torch.zeros_like(x) if g is None else g.detach() for x, g in zip(xs, call.grad, strict=True)]
    inner_loss = call.at_solution
    if inner_loss is None or call.batches.curvature is not None:
        last = call.batches.inner_at(call.steps - 1)
        # With gradients on and y a leaf of a graph: the loss may take gradients of its own.
        inner_loss = call.problem.inner(tree.attach(moved), tree.like(call.outer, xs), last).detach()
    assert call.outer_loss is not None, "the engine has run the upper problem"
    sound = tree.finite([*grad, call.outer_loss, inner_loss])
    code = torch.where(sound, bl.Status.OK.code, bl.Status.NONFINITE.code)
    return bl.Hypergradient(
        grad=tree.like(call.outer, grad),
        inner=moved,
        outer_loss=call.outer_loss,
        inner_loss=inner_loss,
        stats={"inner_steps": call.steps},
        code=torch.where(tree.finite(moved), code, bl.Status.DIVERGED.code),
    )


# --- the solver


def _plain(solver: bl.InnerSolver, method: Method) -> float:
    """The inner step size, if Betty can do what the solver does.

    Raises:
        ValueError: it cannot.
    """
    update = solver.dynamics.update
    if not (isinstance(solver, bl.Descent) and isinstance(update, (bl.SGD, bl.Adam, bl.AdamW))):
        raise ValueError(
            f"Betty takes a fixed number of steps of a torch optimizer, and was given {solver}; write "
            f"bl.Descent(bl.SGD(lr=0.1), steps=10), or Adam or AdamW"
        )
    if solver.max_steps < 1:
        raise ValueError(f"Betty takes at least one inner step, and was given {solver}")
    if method.name == "unrolled" and isinstance(update, bl.AdamW):
        raise ValueError(
            "Betty's differentiable AdamW loses its own update (it is written to a tensor that is thrown away); use "
            "Adam or SGD for betty unrolled"
        )
    numbers = [getattr(update, field.name) for field in dataclasses.fields(update)]
    flat = [entry for value in numbers for entry in (value if isinstance(value, tuple) else (value,))]
    if not all(isinstance(value, (int, float)) for value in flat):
        raise ValueError(
            f"the hyper-parameters of a torch optimizer are numbers, and Betty was given {update}, with a function of "
            f"the outer variable or a tree"
        )
    assert isinstance(update.lr, (int, float)), "looked at above"
    return float(update.lr)


def _optimizer(solver: bl.InnerSolver, parameters: Iterator[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The torch optimizer that moves as the solver's does."""
    update: Any = solver.dynamics.update
    given = {field.name: getattr(update, field.name) for field in dataclasses.fields(update)}
    if isinstance(update, bl.SGD):
        # (Without a momentum torch.optim.SGD ignores the dampening, and Betty's differentiable one does not.)
        return torch.optim.SGD(parameters, **(given if update.momentum else given | {"dampening": 0.0}))
    if isinstance(update, bl.Adam):
        return torch.optim.Adam(parameters, **given)
    # Betty 0.2.1 makes the optimizer again from its `defaults`, which today's AdamW does not take; Adam takes them.
    decoupled = "decoupled_weight_decay" in inspect.signature(torch.optim.Adam).parameters
    return (
        torch.optim.Adam(parameters, **given, decoupled_weight_decay=True)
        if decoupled
        else torch.optim.AdamW(parameters, **given)
    )
