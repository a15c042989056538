"""Learner: meta-learning as one object.

    what adapts, from where, how, how the outer gradient is estimated, and how x moves

| method | what differs from `Learner(module, loss, solver=Descent(SGD(lr), K))` |
| --- | --- |
| MAML | nothing |
| FOMAML | `estimator=FirstOrder()` |
| ANIL | `adapts="head"`: the last layer's name |
| BOIL | `adapts=lambda name: not name.startswith("head")` |
| Meta-SGD | `rates=Rates(per="element")` |
| MAML++: rates per layer and step | `rates=Rates(per="tensor", per_step=True)` |
| MAML++: multi-step loss | `estimator=Unrolled(step_weights=...)` |
| Reptile | `estimator=Reptile()` |
| iMAML | `start=Shared(pull=2.0)`, `estimator=Implicit(CG(5))` |
| first-order corrected (2409.03682) | `start=Shared(pull=2.0)`, `estimator=FirstOrderCorrected()` |
| memory-reduced (2412.12030) | `adapts="head"`, `start=Fixed()`, `estimator=MemoryReduced()` |
| ridge and kernel heads (R2D2, I-AMFS) | `adapts=KernelRidge(...)` |
| weighted tasks (O-AMFS) | `weights=GradientSimilarity(...)` |

x is a dict: "parameters", those of the module that are learned; "rates" and "head" where there are such.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.adapt import adapt
from bilevel.batches import Batches
from bilevel.engine.base import Engine
from bilevel.estimators.base import Estimator, Path
from bilevel.estimators.reverse.unrolled import Unrolled
from bilevel.functional import Trainable
from bilevel.hypergradient import hypergradient
from bilevel.inner.base import InnerSolver
from bilevel.inner.descent import Descent
from bilevel.iterate import Step, iterate
from bilevel.meta.evaluation import Evaluation, Scores, accuracy, number
from bilevel.meta.head import Head
from bilevel.meta.model import InFunctionSpace, InParameters, Model
from bilevel.meta.rates import Rates
from bilevel.meta.start import Shared, Start, check_pull
from bilevel.optim.sgd import SGD
from bilevel.outcome import Hypergradient
from bilevel.problem import Problem, proximal
from bilevel.space import tree
from bilevel.tasks.base import TaskWeights
from bilevel.tasks.mean import TaskMean

Outer = dict[str, dict[str, Tensor]]
Optimizing = Callable[[list[Tensor]], torch.optim.Optimizer]

SMALL = 4096
"""Parameters of a module whose operators are so small that a CPU does many tasks at once in the time of one."""


@dataclasses.dataclass(frozen=True, eq=False)
class Learner:
    """A method of meta-learning, from a module and a loss.

    Batches are `Batches(inner=support, outer=query)`, each a pair `(inputs, targets)` whose tensors have a leading task
    dimension T: what `bilevel.data.Episodes` yields. The module is read, never written: x is a copy of its parameters.

    Args:
        module: any nn.Module that `bilevel.functional` takes; `module(inputs)` is the prediction. Its forward sees one
            task. With a `Head`, `module(inputs)` are the features.
        loss: called as `loss(prediction, target)`; returns a 0-dim tensor. Of the support it is g, of the query f.
        adapts: what adapts: names and prefixes of names of parameters, a function of the name that says yes or no, or
            True for all that require grad; or a `Head`, which adapts in function space, on top of the module.
        start: from where; see `Shared` and `Fixed`. A head starts at its closed form.
        solver: how; None for five steps of SGD(lr=0.1), for a head for none.
        rates: learned step sizes in place of those of the solver.
        estimator: how the hypergradient of one task is estimated.
        optimizer: how x moves: called with the list of x's tensors; returns a torch.optim optimizer.
        weights: how tasks are weighted; None for the plain mean.
        chunk: tasks at once, as for `TaskMean`. None for what was measured (benchmarks/tasks_at_once.py): one by one on
            a CPU where the module has more than 4,096 parameters, all at once otherwise. A number of at least T means
            all at once, too; `bilevel_profiling.largest_fit(case, "8GiB", over="chunk")` finds the one that fits.
        engine: how derivatives are computed, in training and in adaptation, as for `bilevel.hypergradient`; what it
            compiles is kept with the learner.
        group: the processes that share the tasks, as for `TaskMean`: loaders yield each rank's own.
        reuse_features: where the module is an nn.Sequential and its first layers do not adapt, run those once per task
            instead of once per step. A layer of them that draws random numbers (dropout) then draws once per task.

    Memory and cost: those of the estimator, per task, times the tasks of a chunk.

    Raises:
        TypeError, ValueError: an argument is not what is needed; `adapts` matches no parameter; nothing is learned.

    Example:
        >>> import torch, bilevel as bl
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> anil = bl.meta.Learner(net, torch.nn.functional.cross_entropy, adapts="2")
        >>> x = anil.outer()
        >>> support = torch.randn(4, 6, 2), torch.arange(6).remainder(3).expand(4, 6)
        >>> step, = anil.train(x, [bl.Batches(inner=support, outer=support)])
        >>> step.hypergradient.inner["2.weight"].shape
        torch.Size([4, 3, 8])
        >>> net.load_state_dict(anil.adapt(x, (support[0][0], support[1][0])))
        <All keys matched successfully>
    """

    module: nn.Module
    loss: Callable[[Any, Any], Tensor]
    adapts: Trainable | Head = True
    start: Start = dataclasses.field(default_factory=Shared)
    solver: InnerSolver | None = None
    rates: Rates | None = None
    estimator: Estimator = dataclasses.field(default_factory=Unrolled)
    optimizer: Optimizing = dataclasses.field(default=functools.partial(torch.optim.Adam, lr=1e-3))
    weights: TaskWeights | None = None
    chunk: int | None = None
    reuse_features: bool = True
    engine: Engine | None = None
    group: Any = None

    def __post_init__(self) -> None:
        for name, kind, write in (
            ("module", nn.Module, "an nn.Module"),
            ("start", Start, "bilevel.meta.Shared() or Fixed()"),
            ("estimator", Estimator, "an estimator for one task, such as bilevel.Unrolled()"),
        ):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"Learner was given {name}={getattr(self, name)!r}; {write} was needed")
        for name, optional, write in (
            ("solver", InnerSolver, "bilevel.Descent(bilevel.SGD(lr=0.1), steps=5)"),
            ("rates", Rates, "bilevel.meta.Rates(per='element')"),
            ("engine", Engine, "bilevel.Compiled()"),
        ):
            value = getattr(self, name)
            if value is not None and not isinstance(value, optional):
                raise TypeError(f"Learner was given {name}={value!r}; None or {write} was needed")
        for name in ("loss", "optimizer"):
            if not callable(getattr(self, name)):
                raise TypeError(f"Learner was given {name}={getattr(self, name)!r}; a function was needed")
        check_pull(f"Learner was given {type(self.start).__name__}, and that", self.start.pull)
        self._task_mean()  # checks estimator, chunk and weights
        if isinstance(self.adapts, Head):
            self._check_head(self.adapts)
        _ = self.model  # what adapts is looked up now
        if not tree.tensors(self.outer()):
            raise ValueError(
                "Learner has nothing to learn: every parameter adapts from a fixed start, or is frozen. Write "
                "start=Shared(), let fewer adapt, or let parameters require grad"
            )

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles hold: the arguments. What was made of them would run the original's module."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def _check_outer(self, outer: Any) -> None:
        """Raise ValueError unless x has all the tensors that `outer()` has."""
        wanted = {
            f"x[{group!r}][{name!r}]": tuple(leaf.shape)
            for group, leaves in self._outer().items()
            for name, leaf in leaves.items()
        }
        groups = outer.items() if isinstance(outer, Mapping) else ()
        given = {
            f"x[{group!r}][{name!r}]": tuple(leaf.shape)
            for group, leaves in groups
            if isinstance(leaves, Mapping)
            for name, leaf in leaves.items()
            if isinstance(leaf, Tensor)
        }
        if wrong := [name for name, shape in wanted.items() if given.get(name) != shape]:
            name = wrong[0]
            raise ValueError(
                f"a Learner was given an x in which {name} of shape {wanted[name]} "
                + (f"has the shape {given[name]}" if name in given else "is missing")
                + "; write x = learner.outer(), and change its tensors in place"
            )

    def _check_head(self, head: Head) -> None:
        if Path.START not in self.estimator.sees_after(self.inner_solver.max_steps):
            raise ValueError(
                f"Learner was given {type(head).__name__} as what adapts, whose closed form is the start of the inner "
                f"loop, and {type(self.estimator).__name__}, which does not look at the start. Use Unrolled() or "
                f"FirstOrder(), which are exact for it"
            )
        if self.rates is not None or self.start != Shared():
            raise ValueError(
                f"Learner was given {type(head).__name__} as what adapts, with start={self.start!r} and "
                f"rates={self.rates!r}; a head starts at its closed form and has no step sizes. Leave both out"
            )

    @functools.cached_property
    def model(self) -> Model:
        """The module with what adapts taken apart."""
        if isinstance(self.adapts, Head):
            return InFunctionSpace(self.module, self.adapts)
        return InParameters(self.module, self.adapts, self.start, reuse_features=self.reuse_features)

    @functools.cached_property
    def inner_solver(self) -> InnerSolver:
        """The solver that runs: the one given or its default, with the learned rates in it."""
        steps = 0 if isinstance(self.adapts, Head) else 5
        solver = Descent(SGD(lr=0.1), steps) if self.solver is None else self.solver
        return solver if self.rates is None else self.rates.applied(solver)

    @functools.cached_property
    def problem(self) -> Problem:
        """The bilevel problem of one task, in x = `outer()`."""
        model, loss = self.model, self.loss
        problem = Problem(
            inner_loss=lambda y, x, batch: model.inner_loss(loss, y, x, batch),
            outer_loss=lambda y, x, batch: model.outer_loss(loss, y, x, batch),
            init=model.begin,
            features=model.features,
        )
        return proximal(problem, self.start.pull) if self.start.pull > 0 else problem

    def outer(self) -> Outer:
        """A fresh x: leaves that require grad, copied from the module."""
        copied = {
            group: {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
            for group, leaves in self._outer().items()
        }
        return {group: leaves for group, leaves in copied.items() if leaves}

    def _outer(self) -> Outer:
        given = self.model.outer()
        if self.rates is not None:
            solver = Descent(SGD(lr=0.1), 5) if self.solver is None else self.solver
            given["rates"] = self.rates.variables(self.model.adapted(), solver)
        return given

    def hypergradient(self, outer: Outer, batches: Batches, *, state: Any = None) -> Hypergradient:
        """`bilevel.hypergradient` of the mean over the tasks in `batches`.

        Args:
            outer: x.
            batches: support and query of T tasks.
            state: that of the last result, for estimators that carry one.
        """
        estimator = self._task_mean()
        with estimator.company.guarded():
            self._check_outer(outer)
        return hypergradient(
            self.problem,
            outer,
            None,
            batches,
            solver=self.inner_solver,
            estimator=estimator,
            state=state,
            engine=self.engine,
        )

    def train(
        self,
        outer: Outer,
        loader: Iterable[Batches],
        *,
        optimizer: torch.optim.Optimizer | None = None,
        state: Any = None,
        **options: Any,
    ) -> Iterator[Step]:
        """`bilevel.iterate`: one outer step for each item of `loader`; the loop body stays the user's.

        Args:
            outer: x; moved in place.
            loader: yields `Batches` of T tasks.
            optimizer: one that is made already, such as that of an interrupted run; None to make one.
            state: the estimator's state to begin with.
            **options: of `bilevel.iterate`.
        """
        estimator = self._task_mean()
        with estimator.company.guarded():
            self._check_outer(outer)
            made = self.optimizer(tree.tensors(outer)) if optimizer is None else optimizer
        return iterate(
            self.problem,
            outer,
            None,
            loader,
            solver=self.inner_solver,
            estimator=estimator,
            optimizer=made,
            state=state,
            **{"engine": self.engine, **options},
        )

    def adapt(
        self, outer: Outer, support: tuple[Any, Any], *, tasks: bool = False, solver: InnerSolver | None = None
    ) -> dict[str, Tensor]:
        """The module's state_dict, adapted to a task: what `module.load_state_dict` takes.

        Args:
            outer: x.
            support: `(inputs, targets)` of one task; with `tasks`, of T tasks.
            tasks: whether support has a leading task dimension; the parameters that adapted then have one too.
            solver: another one than at training, for more steps, say (learned rates of each step have no more).

        Raises:
            ValueError: what adapts is a head, which has no place in the module; see `predict`.
        """
        y = self._adapted(outer, support, tasks=tasks, solver=solver)
        return self.model.state_dict(y, outer)

    def predict(self, outer: Outer, support: tuple[Any, Any], inputs: Any, *, solver: InnerSolver | None = None) -> Any:
        """The predictions for `inputs` after adapting to the support of one task, without a graph."""
        y = self._adapted(outer, support, tasks=False, solver=solver)
        with torch.no_grad():
            return self.model.predict(y, tree.detach(outer), inputs)

    def evaluate(
        self,
        outer: Outer,
        loader: Iterable[Batches],
        *,
        score: Callable[[Any, Any], Any] = accuracy,
        solver: InnerSolver | None = None,
        tasks: int | None = None,
    ) -> Evaluation:
        """The mean score over test tasks, with its 95 % interval.

        Args:
            outer: x.
            loader: yields `Batches` of test tasks; the literature takes 600 or more in all.
            score: of one task, called as `score(prediction, target)` on its query; a number. By default the share of
                rows whose largest entry is at the target.
            solver: another one than at training.
            tasks: stop after so many (on each rank); None for all that the loader yields.

        Raises:
            ValueError: fewer than two tasks, or fewer than `tasks`. (RankError: another rank failed.)
        """
        company = self._task_mean().company
        with company.guarded():
            own = self._scores(outer, loader, score, solver, tasks)
        return Evaluation.of_all(company.gathered(own, outer), wanted=tasks)

    def _scores(
        self, outer: Outer, loader: Iterable[Batches], score: Any, solver: InnerSolver | None, tasks: int | None
    ) -> Scores:
        self._check_outer(outer)
        x, scores, losses, codes = tree.detach(outer), list[float](), list[float](), list[int]()
        for batches in loader:
            found = adapt(
                self.problem,
                x,
                None,
                batches,
                solver=self._solver(solver),
                tasks=True,
                chunk=self._chunk,
                engine=self.engine,
            )
            inputs, targets = batches.outer
            codes.append(int(found.code))
            losses += [] if found.outer_loss is None else found.outer_loss.double().tolist()
            with torch.no_grad():
                for task in range(len(tree.tensors(batches.outer)[0])):
                    y, one, target = (
                        tree.tree_map(lambda leaf, task=task: leaf[task] if isinstance(leaf, Tensor) else leaf, value)
                        for value in (found.inner, inputs, targets)
                    )
                    scores.append(number(score(self.model.predict(y, x, one), target)))
            if tasks is not None and len(scores) >= tasks:
                break
        return scores[:tasks], losses[:tasks], codes

    def _adapted(self, outer: Outer, support: Any, *, tasks: bool, solver: InnerSolver | None) -> Any:
        self._check_outer(outer)
        batches = Batches(inner=support, outer=support)
        x = tree.detach(outer)
        found = adapt(
            self.problem,
            x,
            None,
            batches,
            solver=self._solver(solver),
            tasks=tasks,
            chunk=self._chunk if tasks else None,
            evaluate=False,
            engine=self.engine,
        )
        found.raise_if_failed()
        return found.inner

    def _solver(self, solver: InnerSolver | None) -> InnerSolver:
        if solver is None:
            return self.inner_solver
        return solver if self.rates is None else self.rates.applied(solver)

    @functools.cached_property
    def _chunk(self) -> int | None:
        if self.chunk is not None:
            return self.chunk
        parameters = list(self.module.parameters())
        large = sum(parameter.numel() for parameter in parameters) > SMALL
        return 1 if large and parameters[0].device.type == "cpu" else None

    def _task_mean(self) -> TaskMean:
        return TaskMean(self.estimator, self._chunk if self.weights is None else self.chunk, self.weights, self.group)
