"""What a Betty program with one of our estimators refuses, and in which words: never a wrong number, nor Betty's
traceback."""

import dataclasses
import re

import pytest
import torch
from betty_programs import Quadratic, Quiet, Vector, Watched, edges, problem, recent, run, sgd
from torch import nn
from torch.nn import functional as F

import bilevel as bl
from bilevel.integrations import betty

CG = bl.Implicit(bl.CG(10, tol=1e-10))


def ran(quadratic=None, *, steps=3, use=None, kind=None, optimizer=None, before=lambda upper, lower: None, **config):
    """Run two outer steps of the quadratic program, changed as asked for."""
    quadratic = quadratic or Quadratic()
    upper, lower, dependencies = quadratic.problems(steps, optimizer, kind, **config)
    if use is not None:
        betty.use(lower, use)
    before(upper, lower)
    run([upper, lower], dependencies, 2 * steps)
    return upper, lower


def changed(**members):
    return lambda base: type("Lower", (base,), members)


def clip(self, *_):
    with torch.no_grad():
        self.module.value.clamp_(-0.01, 0.01)


def scaled(self, *_):
    self.optimizer.step()


class Sign(torch.optim.Optimizer):
    """An optimizer that shrinks what it moves, without a setting that says so."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(0.999).sub_(group["lr"] * p.grad.sign())


def held(self, batch):
    """A loss that holds on to the parameter object."""
    if not hasattr(self, "mine"):
        self.mine = list(self.module.parameters())
    return (self.mine[0] ** 2).sum() - (self.module() * self.upper()).sum()


def attention(self, batch):
    y = self.module().reshape(1, 1, 2, 2)
    return F.scaled_dot_product_attention(y, y, y).square().sum() - (self.module() * self.upper()).sum()


def without_upper(self, batch):
    return self.module().square().sum()


def without_lower(self, batch):
    return self.upper().square().sum() + 0 * self.module().detach().sum() + self.module().sum() * 0


def by_identity(self, batch):
    """A penalty on the parameters that are in a set made earlier."""
    if not hasattr(self, "penalized"):
        self.penalized = {id(p) for p in self.module.parameters()}
    decay = sum(p.square().sum() for p in self.module.parameters() if id(p) in self.penalized)
    return decay + (self.module() - self.upper()).square().sum()


def by_kind(self, batch):
    decay = sum(p.square().sum() for p in self.module.parameters() if isinstance(p, nn.Parameter))
    return decay + (self.module() - self.upper()).square().sum()


def detached_by_kind(self, batch):
    """The value is the same at every point, the gradient is not."""
    own = [p if isinstance(p, nn.Parameter) else p.detach() for p in self.module.parameters()]
    return (own[0] - self.upper()).square().sum()


def annealed(self, batch):
    """A weight that grows with the calls."""
    self.calls = getattr(self, "calls", 0) + 1
    return (self.module() - self.upper()).square().sum() * 1.5**self.calls


def hooked(parameters):
    parameters = list(parameters)
    parameters[0].register_hook(lambda g: g * 0.5)
    return torch.optim.SGD(parameters, lr=0.1)


def projecting(lower):
    lower.optimizer.register_step_post_hook(lambda *_: None)


class NonNegative(torch.optim.SGD):
    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.clamp_(min=0)


def stepped(self, *_):
    self.optimizer.step()
    with torch.no_grad():
        self.module.value.clamp_(min=0)


class Fixed(torch.autograd.Function):
    """A loss whose backward computes with detached tensors: it has no second derivative, and autograd says nothing."""

    @staticmethod
    def forward(ctx, y):
        ctx.save_for_backward(y)
        return y.square().sum()

    @staticmethod
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        return 2 * y.detach() * gradient


def detached(self, batch):
    return Fixed.apply(self.module()) - (self.module() * self.upper()).sum()


REFUSED = {
    "a choice of parameters by identity": (
        {"type": CG, "kind": changed(training_step=by_identity)},
        r"training_step of problem lower, or its gradient, is not the same .*named_parameters",
    ),
    "a choice of parameters by class": (
        {"type": CG, "kind": changed(training_step=by_kind)},
        r"training_step of problem lower, or its gradient, is not the same where the parameters are exchanged",
    ),
    "a gradient that differs where the value does not": (
        {"type": CG, "kind": changed(training_step=detached_by_kind)},
        r"training_step of problem lower, or its gradient, is not the same",
    ),
    "a loss with a counter of its own": (
        {"use": bl.Unrolled(), "kind": changed(training_step=annealed)},
        r"training_step of problem lower gives .* a call changes what the next one sees",
    ),
    "a loss by a hand-written Betty method": (
        {"type": CG, "kind": changed(get_loss=lambda self, batch: (self.training_step_exec(batch) * 2, {}))},
        r"problem lower has get_loss, which may move its parameters",
    ),
    "a hook on the optimizer's step": (
        {"type": CG, "before": lambda upper, lower: setattr(lower, "patch_optimizer", lambda: projecting(lower))},
        r"problem lower has hooks on the step of its optimizer",
    ),
    "a projection in the optimizer": (
        {"type": CG, "optimizer": lambda p: NonNegative(p, lr=0.1)},
        r"problem lower is moved by NonNegative, of which nothing is known",
    ),
    "a projection in the problem's step": (
        {"type": CG, "kind": changed(optimizer_step=stepped)},
        r"problem lower has optimizer_step, which may move its parameters",
    ),
    "hooks on gradients": (
        {"type": CG, "optimizer": hooked},
        r"problem lower has hooks on gradients",
    ),
    "ascent": (
        {"type": CG, "optimizer": lambda p: torch.optim.SGD(p, lr=0.1, maximize=True)},
        r"problem lower is moved by SGD\(maximize=True\); negate its loss",
    ),
    "an optimizer of torch's that decays in another way": (
        {"type": CG, "optimizer": lambda p: torch.optim.ASGD(p, lambd=0.1)},
        r"problem lower is moved by ASGD, which does not rest where",
    ),
    "a parameter that is named twice": (
        {"type": CG, "kind": changed(trainable_parameters=lambda self: 2 * list(self.module.parameters()))},
        r"problem lower names a trainable parameter twice",
    ),
    "a callback that may move parameters": (
        {"type": CG, "kind": changed(param_callback=clip)},
        r"problem lower has param_callback, which may move its parameters",
    ),
    "a step of its own": (
        {"type": CG, "kind": changed(custom_optimizer_step=scaled)},
        r"problem lower has custom_optimizer_step",
    ),
    "decoupled decay at a point": (
        {"type": CG, "optimizer": lambda p: torch.optim.Adam(p, weight_decay=0.1, decoupled_weight_decay=True)},
        r"problem lower is moved by Adam, which does not rest where gradient .*\.use\(problem, bilevel.Unrolled\(\)\)",
    ),
    "an optimizer that shrinks in secret": (
        {"type": CG, "optimizer": Sign},
        r"problem lower is moved by Sign, of which nothing is known",
    ),
    "a replay of a callback": (
        {"use": bl.Unrolled(), "kind": changed(param_callback=clip)},
        r"the steps of problem lower could not be replayed",
    ),
    "a replay of clipping": (
        {"use": bl.Unrolled(), "gradient_clipping": 0.1},
        r"problem lower uses gradient_clipping",
    ),
    "a replay of accumulation": (
        {"use": bl.Unrolled(), "gradient_accumulation": 2, "steps": 2},
        r"problem lower uses gradient_accumulation",
    ),
    "a replay of an optimizer that is not known": (
        {"use": bl.Unrolled(), "optimizer": lambda p: torch.optim.RMSprop(p)},
        r"problem lower is moved by RMSprop, whose steps cannot be differentiated here; SGD, Adam or AdamW",
    ),
    "a replay of amsgrad": (
        {"use": bl.Unrolled(), "optimizer": lambda p: torch.optim.Adam(p, amsgrad=True)},
        r"problem lower is moved by Adam\(amsgrad=True\)",
    ),
    "steps that nobody kept": (
        {"type": bl.Unrolled()},
        r"Unrolled differentiates the steps of problem lower.*use\(lower, bilevel.Unrolled\(\.\.\.\)\)",
    ),
    "a parameter that the loss holds on to": (
        {"type": CG, "kind": changed(training_step=held)},
        r"training_step of problem lower, or its gradient, is not the same .* holds on to parameter objects",
    ),
    "a loss without the upper parameters": (
        {"type": CG, "kind": changed(training_step=without_upper)},
        r"training_step of problem lower does not use the parameters of problem upper",
    ),
}


if betty.release.installed_version() < (0, 2):  # which makes its optimizers otherwise
    del REFUSED["a hook on the optimizer's step"]


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("label", REFUSED)
def test_a_program_that_cannot_be_differentiated_is_refused_in_words(label):
    settings, said = REFUSED[label]
    settings = dict(settings)
    if isinstance(settings.get("type"), bl.Estimator):
        settings["type"] = betty.register(settings["type"])
    with pytest.raises(ValueError, match=said):
        ran(**settings)


@pytest.mark.parametrize("use", [None, bl.Unrolled()], ids=["implicit", "unrolled"])
@pytest.mark.parametrize("training_step", [attention, detached], ids=["attention", "a backward that detaches"])
def test_a_loss_without_a_second_derivative_is_named(training_step, use):
    settings = {"type": betty.register(CG)} if use is None else {"use": use}
    with pytest.raises(
        bl.NotTwiceDifferentiableError, match=r"(?s)problem lower: .*register\(bilevel.FirstOrderCorrected"
    ):
        ran(kind=changed(training_step=training_step), **settings)


def test_a_solver_in_the_place_of_the_optimizer_decays_as_it_does():
    """Its weight decay is a part of where the problem rests."""
    quadratic, here = Quadratic(), bl.Descent(bl.SGD(lr=1.0), 0)
    decaying = sgd(quadratic.lr / 2, weight_decay=0.5)
    with pytest.raises(ValueError, match=r"problem lower is moved with weight_decay=0.5, and SGD.* weight_decay=0.5\)"):
        ran(quadratic, optimizer=decaying, type=betty.register(CG, here))
    right = bl.Descent(bl.SGD(lr=1.0, weight_decay=0.5), 0)
    upper, _ = ran(quadratic, steps=600, optimizer=decaying, type=betty.register(CG, right))
    exact = quadratic.exact(decay=0.5)
    assert (upper.gradients[-1][0] - exact).norm() < 1e-8 * exact.norm()
    decoupled = lambda p: torch.optim.Adam(p, weight_decay=0.5, decoupled_weight_decay=True)  # noqa: E731
    with pytest.raises(
        ValueError, match=r"weight_decay=0.5 \(decoupled\), .* bilevel.AdamW\(\.\.\., weight_decay=0.5\)"
    ):
        ran(quadratic, optimizer=decoupled, type=betty.register(CG, right))


@recent
def test_a_replay_that_ends_elsewhere_is_refused():
    """Something else moved the parameters between two steps."""

    def disturbed(self, batch):
        with torch.no_grad():
            self.lower.module.value.mul_(0.9)
        return self.module().square().sum()

    quadratic = Quadratic()
    upper, lower, dependencies = quadratic.problems(3)
    betty.use(lower, bl.Unrolled())
    other = problem(changed(training_step=disturbed)(Quiet), "other", Vector(quadratic.x), sgd(0.1))
    dependencies["l2u"][other] = [lower]
    with pytest.raises(ValueError, match=r"the steps of problem lower could not be replayed: .* Something else moves"):
        run([upper, lower, other], dependencies, 3)


@recent
def test_an_upper_problem_that_comes_in_the_middle_of_a_loop_is_refused():
    quadratic = Quadratic()

    class Lower(Quiet):
        def training_step(self, batch):
            return (self.module() - self.upper()).square().sum()

    class Upper(Watched):
        def training_step(self, batch):
            return (self.a() - self.b() - quadratic.c).square().sum()

    a, b = (
        problem(Lower, name, Vector(quadratic.x), sgd(0.1), unroll_steps=steps) for name, steps in (("a", 2), ("b", 3))
    )
    upper = problem(Upper, "upper", Vector(quadratic.x), sgd(0.1))
    for each in (a, b):
        betty.use(each, bl.Unrolled())
    with pytest.raises(ValueError, match=r"problem a has made 1 recorded steps .* came in the middle"):
        run([upper, a, b], edges(u2l={upper: [a, b]}, l2u={a: [upper], b: [upper]}), 3)


def test_problems_that_share_parameters_are_refused_before_and_while_it_runs():
    quadratic = Quadratic()
    shared = Vector(quadratic.x)

    class Upper(Watched):
        def training_step(self, batch):
            return (self.lower() - quadratic.c).square().sum()

    class Lower(Quiet):
        def training_step(self, batch):
            return (self.module() - self.upper()).square().sum()

    lower = problem(Lower, "lower", shared, sgd(0.1), type=betty.register(CG))
    upper = problem(Upper, "upper", shared, sgd(0.1), retain_graph=True)
    dependencies = edges(u2l={upper: [lower]}, l2u={lower: [upper]})
    said = r"problems (upper and lower|lower and upper) share parameters \(value\)"
    with pytest.raises(ValueError, match=said):
        betty.check([upper, lower], dependencies)
    with pytest.raises(ValueError, match=said):
        run([upper, lower], dependencies, 1)


def three():
    quadratic = Quadratic()

    class Any(Quiet):
        def training_step(self, batch):
            return self.module().sum()

    return [problem(Any, name, Vector(quadratic.x), sgd(0.1)) for name in ("top", "mid", "low")]


@recent
def test_a_path_with_a_missing_edge_is_named():
    top, mid, low = three()
    complete = edges(u2l={top: [low]}, l2u={low: [mid], mid: [top]})
    betty.check([top, mid, low], complete)
    missing = edges(u2l={top: [low]}, l2u={low: [mid]})
    with pytest.raises(ValueError, match=r'"u2l" says that top differentiates through low, .* \{low: \[top\]\}'):
        betty.check([top, mid, low], missing)
    with pytest.raises(ValueError, match=r"no edges of .* lead from low up to top"):
        betty.check([top, mid, low], edges(u2l={top: [low]}, l2u={}))


def test_the_engine_of_a_program_with_one_of_ours_says_it_too():
    top, mid, low = three()
    missing = edges(u2l={top: [low]}, l2u={low: [mid]})
    with pytest.raises(AssertionError, match="No path"):  # Betty's own
        run([top, mid, low], missing, 1)
    top, mid, low = three()
    betty.use(low, CG)
    with pytest.raises(ValueError, match=r'"u2l" says that top differentiates through low'):
        run([top, mid, low], edges(u2l={top: [low]}, l2u={low: [mid]}), 1)


def test_other_graphs_that_betty_would_run_wrong_are_named():
    top, mid, low = three()
    complete = edges(u2l={top: [low]}, l2u={low: [mid], mid: [top]})
    with pytest.raises(ValueError, match=r"mid is not among the problems"):
        betty.check([top, low], complete)
    with pytest.raises(ValueError, match=r"lead from low back to low|lead from .* back to"):
        betty.check([top, mid, low], edges(u2l={}, l2u={low: [mid], mid: [low]}))
    twin = three()[2]
    with pytest.raises(ValueError, match=r"two problems are called low"):
        betty.check([top, mid, low, twin], complete)


@recent
def test_a_type_that_betty_does_not_know_and_one_that_is_never_used_are_named():
    top, mid, low = three()
    complete = edges(u2l={top: [low]}, l2u={low: [mid], mid: [top]})
    low._config = dataclasses.replace(low.config, type="no such")
    with pytest.raises(ValueError, match=r"problem low has type='no such'"):
        betty.check([top, mid, low], complete)
    betty.use(low, CG)
    betty.check([top, mid, low], complete)
    with pytest.raises(ValueError, match=r"problem low was given an estimator, and no path"):
        betty.check([top, mid, low], edges(u2l={top: [mid]}, l2u={low: [mid], mid: [top]}))
    top._config = dataclasses.replace(top.config, first_order=False)
    with pytest.raises(ValueError, match=r"problem top has first_order=False"):
        betty.check([top, mid, low], complete)


def test_what_is_wrong_with_the_release_is_said_where_it_is_used():
    if betty.installed().version != "0.2.1":
        pytest.skip("the sentences are those of 0.2.1")
    top, mid, low = three()
    low._config = dataclasses.replace(low.config, type="cg")
    complete = edges(u2l={top: [low]}, l2u={low: [mid], mid: [top]})
    with pytest.warns(UserWarning, match="problem low: Betty's cg updates its direction with the old residual"):
        betty.check([top, mid, low], complete)
    mid._config = dataclasses.replace(mid.config, type="neumann")
    with pytest.raises(ValueError, match=r"problem mid has type='neumann' and is itself above low"):
        betty.check([top, mid, low], edges(u2l={top: [mid], mid: [low]}, l2u={low: [mid], mid: [top]}))


@recent
def test_optimizers_that_betty_cannot_make_or_makes_otherwise_are_said():
    top, mid, low = three()
    complete = edges(u2l={top: [low]}, l2u={low: [mid], mid: [top]})
    low.optimizer = torch.optim.AdamW(low.module.parameters())
    with pytest.raises(
        ValueError, match=r"problem low has a AdamW, which Betty makes anew .*decoupled_weight_decay=True"
    ):
        betty.check([top, mid, low], complete)
    low.optimizer = torch.optim.SGD([{"params": low.module.parameters(), "lr": 0.7}], lr=0.1)
    with pytest.warns(UserWarning, match=r"problem low has parameter groups with settings of their own \(lr\)"):
        betty.check([top, mid, low], complete)


def test_mistakes_in_the_dependencies_are_said():
    top, mid, low = three()
    for wrong in (
        None,
        {"u2l": {top: low}, "l2u": {low: [top]}},
        {"u2l": {"top": ["low"]}},
        {"u2l": {top: [None]}},
    ):
        with pytest.raises(TypeError, match=r'a dict \{"u2l": \{upper: \[lower\]\}.* was needed'):
            betty.check([top, mid, low], wrong)


@recent
def test_optimizers_and_schedulers_that_betty_cannot_run_are_named():
    def case(optimizer, scheduler=None, kind="darts"):
        top, mid, low = three()
        low.optimizer = optimizer(low.module.parameters())
        low.scheduler = scheduler(low.optimizer) if scheduler else None
        low._config = dataclasses.replace(low.config, type=kind)
        betty.check([top, mid, low], edges(u2l={top: [low]}, l2u={low: [mid], mid: [top]}))

    schedules = torch.optim.lr_scheduler
    for arguments, said in (
        ((torch.optim.LBFGS,), "problem low has a LBFGS, whose step needs a closure"),
        ((sgd(0.1), schedules.ReduceLROnPlateau), "problem low has a ReduceLROnPlateau, whose step needs an argument"),
        (
            (sgd(0.1), lambda o: schedules.OneCycleLR(o, 0.1, 10)),
            "problem low has a OneCycleLR, which Betty makes anew",
        ),
        ((sgd(0.1), None, "reinforce"), "type='reinforce', which is an empty function"),
    ):
        with pytest.raises(ValueError, match=said):
            case(*arguments)
    # (A warm-up has changed the rate of the group, and nothing is lost.)
    case(sgd(0.1), lambda o: schedules.LinearLR(o, 0.1, total_iters=5))
    case(sgd(0.1), lambda o: schedules.StepLR(o, 5))


def test_a_loader_that_fills_one_buffer_is_refused_also_in_low_precision():
    """The recorded batches are all the last one."""

    def loader(dtype):
        buffer = torch.zeros(4, dtype=dtype)
        for k in range(100):
            buffer.copy_(torch.full((4,), 1.0 + k % 3))
            yield (buffer,)

    class Buffered:
        def __init__(self, dtype):
            self.dtype = dtype

        def __iter__(self):
            return loader(self.dtype)

    def step(self, batch):
        return ((self.module() - self.upper() * batch[0]) ** 2).sum()

    for dtype, lr in ((torch.float32, 1e-5), (torch.bfloat16, 0.01), (torch.float64, 0.1)):
        quadratic = Quadratic(dtype)
        upper, lower, dependencies = quadratic.problems(3, sgd(lr), changed(training_step=step))
        lower.train_data_loader = Buffered(dtype)
        betty.use(lower, bl.Unrolled())
        with pytest.raises(ValueError, match=r"could not be replayed: .* fills the tensors of earlier batches anew"):
            run([upper, lower], dependencies, 3)


@recent
def test_a_rate_of_zero_on_a_part_is_refused_and_on_all_it_is_a_schedule_that_has_ended():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.zeros(4, dtype=torch.float64)) for _ in range(2))

    class Lower(Quiet):
        def training_step(self, batch):
            return (self.module.a - self.upper()).square().sum() + (self.module.b - self.module.a).square().sum()

        def param_groups(self):
            return [{"params": [self.module.a]}, {"params": [self.module.b], "lr": 0.0}]

    class Upper(Watched):
        def training_step(self, batch):
            return (self.lower.module.a + self.lower.module.b).sum()

    lower = problem(Lower, "lower", Two(), sgd(0.1), unroll_steps=2, type=betty.register(CG))
    upper = problem(Upper, "upper", Vector(torch.ones(4, dtype=torch.float64)), sgd(0.0))
    with pytest.raises(ValueError, match=r"the step size 0 for problem lower.b, which therefore rests anywhere"):
        run([upper, lower], edges(u2l={upper: [lower]}, l2u={lower: [upper]}), 2)
    quadratic = Quadratic()
    upper, lower, dependencies = quadratic.problems(401, type=betty.register(CG))
    lower.scheduler = torch.optim.lr_scheduler.LambdaLR(lower.optimizer, lambda k: float(k < 400))
    run([upper, lower], dependencies, 401)
    assert lower.optimizer.param_groups[0]["lr"] == 0
    assert (upper.gradients[-1][0] - quadratic.exact()).norm() < 1e-8 * quadratic.exact().norm()


def test_several_processes_are_refused():
    quadratic = Quadratic()
    upper, lower, dependencies = quadratic.problems(2, type=betty.register(CG))
    original = upper.training_step

    def training_step(batch):
        lower._strategy = "distributed"
        return original(batch)

    upper.training_step = training_step
    with pytest.raises(ValueError, match=r'problem lower runs with strategy="distributed", over several processes'):
        run([upper, lower], dependencies, 2)


WRONG = {
    "a class": ((bl.Implicit,), TypeError, "the class Implicit itself was given as estimator"),
    "a name": (("cg",), TypeError, "a str was given as estimator"),
    "a torch optimizer": ((CG, torch.optim.SGD), TypeError, "was given as solver"),
    "tasks": ((bl.TaskMean(CG),), ValueError, "a Betty problem has no tasks"),
    "a warm start of y": ((bl.MemoryReduced(warm_inner=True),), ValueError, "where y is, Betty decides"),
    "no steps": ((bl.FirstOrderCorrected(),), ValueError, "FirstOrderCorrected may need inner steps of its own"),
}


@pytest.mark.parametrize("label", WRONG)
def test_wrong_arguments_are_refused_where_they_are_given(label):
    arguments, kind, said = WRONG[label]
    with pytest.raises(kind, match=said):
        betty.register(*arguments)


def test_names_of_bettys_own_and_negative_steps_are_refused():
    with pytest.raises(ValueError, match="name='cg', which is Betty's own"):
        betty.register(CG, name="cg")
    for below in (-1, True, 0.5, bl.Converge(bl.SGD(0.1), tol=1e-3)):
        with pytest.raises(ValueError, match=re.escape(f"below={below!r} was given")):
            betty.register(CG, below=below)
    name = betty.register(CG)
    with pytest.raises(ValueError, match=f"name='{name}', which is that of an estimator registered before"):
        betty.register(bl.Unrolled(), name=name)
    with pytest.raises(TypeError, match=re.escape("use() was given a Linear as problem")):
        betty.use(nn.Linear(1, 1), CG)


@dataclasses.dataclass(frozen=True)
class Matching(bl.Estimator):
    """A user's estimator of something else: the gradient for a normalized vector."""

    sees = frozenset({bl.Path.INNER_LOSS, bl.Path.OUTER_LOSS, bl.Path.STATIONARITY})

    def estimate(self, instance, state):
        found = CG.estimate(instance, state)
        return dataclasses.replace(found, grad=tuple(g / g.norm() for g in found.grad))


@dataclasses.dataclass(frozen=True)
class Own(bl.Estimator):
    """A user's estimator that is right."""

    sees = frozenset({bl.Path.INNER_LOSS, bl.Path.OUTER_LOSS, bl.Path.STATIONARITY})

    def estimate(self, instance, state):
        return CG.estimate(instance, state)


def test_an_estimator_of_the_users_own_is_right_or_refused():
    quadratic = Quadratic()
    here = bl.Descent(bl.SGD(lr=0.1), 0)
    upper, _ = ran(quadratic, steps=400, type=betty.register(Own(), here))
    assert (upper.gradients[-1][0] - quadratic.exact()).norm() < 1e-8 * quadratic.exact().norm()
    with pytest.raises(ValueError, match=r"Matching does not return .* for 2 v it is not twice as large"):
        ran(quadratic, type=betty.register(Matching(), here))
    with pytest.raises(ValueError, match="Own may need inner steps"):
        betty.register(Own())


def test_bootstrapping_is_no_gradient_of_the_upper_loss():
    with pytest.raises(ValueError, match="Bootstrapped does not return"):
        ran(use=bl.Bootstrapped(bl.Unrolled(), bl.estimators.OneStep(bl.Adam(0.1))))


def test_a_failed_solve_stops_the_program_and_one_that_is_tolerated_does_not():
    quadratic = Quadratic()
    quadratic.H = -quadratic.H
    upper, lower, dependencies = quadratic.problems(1, sgd(1e-6), type=betty.register(CG, tolerate=()))
    with pytest.raises(bl.BilevelError, match=r"problem lower, hypergradient for upper: NEGATIVE_CURVATURE") as raised:
        run([upper, lower], dependencies, 1)
    assert raised.value.status is bl.Status.NEGATIVE_CURVATURE
    upper, lower, dependencies = quadratic.problems(1, sgd(1e-6), type=betty.register(CG))
    run([upper, lower], dependencies, 1)
    assert "NEGATIVE_CURVATURE" in lower.logger.lines[-1]
    broken = Quadratic()
    broken.c = broken.c * float("nan")
    upper, lower, dependencies = broken.problems(1, type=betty.register(CG, tolerate=tuple(bl.Status)))
    with pytest.raises(bl.BilevelError, match="NONFINITE"):
        run([upper, lower], dependencies, 1)
