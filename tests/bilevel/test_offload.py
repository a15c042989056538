"""What is kept for later waits on the host: the same numbers, in the memory of two iterates.

No GPU is needed: tensors on the CPU stand for those of a device (`offload.on_a_device`), once with copies at once, once
with copies that are late, as those of a stream may be: what is read too early is NaN, what is freed too early an error.
"""

import contextlib
import dataclasses
import gc
import itertools
import weakref

import pytest
import torch
from bilevel_profiling import Case, forecast, measure
from bilevel_profiling.meters.tensors import Tensors
from torch import nn
from torch.nn import functional as F

import bilevel as bl
from bilevel.engine import offload, rematerialize

DOUBLE = torch.float64
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Late(offload.Direct):
    """Copies that happen in their order, when somebody waits for one or a later one."""

    def __init__(self):
        self.queue, self.log, self.buffers, self.made = [], [], [], 0

    def buffer(self, tensor):
        found = super().buffer(tensor).fill_(float("nan") if tensor.is_floating_point() else -1)
        self.buffers.append(weakref.ref(found))
        return found

    def copy(self, pairs):
        self.made += 1
        back = not any(each() is pairs[0][0] for each in self.buffers)
        for target, source in pairs:
            if back:
                target.fill_(float("nan") if target.is_floating_point() else -1)
            self.queue.append((self.made, back, weakref.ref(target), weakref.ref(source)))
        self.log.append(("back" if back else "away", self.made))
        return self.made

    def wait(self, copies, tensors):
        self.log.append(("wait", copies))
        while self.queue and self.queue[0][0] <= copies:
            _, back, target, source = self.queue.pop(0)
            target, source = target(), source()
            assert (target if back else source) is not None, "the device's memory was freed before the copy"
            if target is not None and source is not None:  # (a host's buffer that nobody wants any more)
                target.copy_(source)

    def alive(self):
        gc.collect()
        return sum(each() is not None for each in self.buffers)


LANES = {"stays": None, "at once": offload.Direct, "late": Late}


@pytest.fixture(params=LANES)
def lane(request):
    made = LANES[request.param]
    with contextlib.nullcontext() if made is None else offload.on_a_device(made()):
        yield


def tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


# --- iterates


def loss(y, x, batch):
    inputs, targets = batch
    hidden = torch.tanh(inputs @ y["a"])
    found = F.dropout(hidden, 0.3) @ y["b"] if "noise" in x else hidden @ y["b"]
    decay = x["decay"].exp() * (y["a"].square().sum() + y["b"].square().sum())
    return (x["weights"].sigmoid() * (found - targets).square().mean(1)).mean() + 0.01 * decay


def outer_loss(y, x, batch):
    inputs, targets = batch
    return (torch.tanh(inputs @ y["a"]) @ y["b"] - targets).square().mean()


def setup(*, noise=False, init=False, tasks=None):
    def rows(*shape, seed):
        return tensor(*(shape if tasks is None else (tasks, *shape)), seed=seed)

    x = {"weights": tensor(6, seed=1), "decay": torch.tensor(-1.0, dtype=DOUBLE)}
    x |= {"noise": torch.zeros((), dtype=DOUBLE)} if noise else {}
    y = {"a": rows(4, 5, seed=2) / 2, "b": rows(5, 2, seed=3) / 2, "unused": rows(3, seed=9)}
    if init:
        x |= {"start": {name: leaf[0] if tasks else leaf for name, leaf in y.items()}}
    problem = bl.Problem(loss, outer_loss, init=(lambda x, batch: dict(x["start"])) if init else None)
    inner, outer = ((rows(6, 4, seed=k), rows(6, 2, seed=k + 1)) for k in (4, 6))
    return problem, x, None if init else y, bl.Batches(inner, outer, curvature=outer)


def found(estimator, optimizer=None, steps=7, solver=None, **options):
    problem, x, y, batches = setup(**options)
    torch.manual_seed(0)
    solver = solver or bl.Descent(optimizer or bl.SGD(lr=0.3, momentum=0.8), steps)
    with contextlib.ExitStack() as stack:
        if options.get("noise"):
            stack.enter_context(pytest.warns(UserWarning, match="influences neither loss"))
        hg = bl.hypergradient(problem, x, y, batches, solver=solver, estimator=estimator)
    return hg, torch.get_rng_state()


def same(ours, theirs):
    (ours, state), (theirs, expected) = ours, theirs
    assert torch.equal(state, expected)
    for one, other in ((ours.grad, theirs.grad), (ours.inner, theirs.inner)):
        pairs = zip(bl.space.tree.tensors(one), bl.space.tree.tensors(other), strict=True)
        for a, b in pairs:
            assert (a - b).norm() <= 1e-12 * max(1.0, float(b.norm()))


OPTIMIZERS = {"SGD": bl.SGD(lr=0.3), "momentum": bl.SGD(lr=0.3, momentum=0.8), "Adam": bl.Adam(lr=0.05)}
KEEPS = {"iterates": {"keep": "iterates"}, "segments": {"keep": "segments"}, "by 3": {"keep": "segments", "segment": 3}}
OPTIONS = {
    "plain": ({}, {}),
    "init": ({"init": True}, {}),
    "dropout": ({"noise": True}, {}),
    "last": ({}, {"last": 4}),
    "step weights": ({}, {"step_weights": (0.0, 0.2, 0.0, 0.3, 0.0, 0.4, 0.0)}),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("option", OPTIONS)
def test_the_hypergradient_is_that_of_the_graph(lane, keep, option, optimizer):
    posed, fields = OPTIONS[option]
    ours = found(bl.Unrolled(**KEEPS[keep], **fields, offload=True), OPTIMIZERS[optimizer], **posed)
    same(ours, found(bl.Unrolled(**fields), OPTIMIZERS[optimizer], **posed))


@pytest.mark.parametrize("keep", KEEPS)
def test_of_resampled_curvature(lane, keep):
    ours = found(bl.Unrolled(**KEEPS[keep], resampled=True, offload=True))
    same(ours, found(bl.Unrolled(**KEEPS[keep], resampled=True)))


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("init", [False, True])
def test_of_tasks(lane, keep, chunk, init):
    ours = found(bl.TaskMean(bl.Unrolled(**KEEPS[keep], offload=True), chunk), tasks=3, init=init)
    same(ours, found(bl.TaskMean(bl.Unrolled(), chunk), tasks=3, init=init))


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("tasks", [None, 3])
def test_of_a_solver_that_stops_by_itself(lane, keep, tasks):
    solver = bl.Converge(bl.SGD(lr=0.3), tol=0.2, max_steps=50)
    estimators = bl.Unrolled(**KEEPS[keep], offload=True), bl.Unrolled()
    ours, theirs = (
        found(each if tasks is None else bl.TaskMean(each), solver=solver, tasks=tasks) for each in estimators
    )
    assert ours[0].stats["inner_steps"] == theirs[0].stats["inner_steps"]
    same(ours, theirs)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("keep", ["iterates", "segments"])
def test_of_few_steps(lane, keep, steps):
    same(found(bl.Unrolled(keep, offload=True), steps=steps), found(bl.Unrolled(), steps=steps))


def test_the_next_iterate_is_on_its_way_while_a_step_is_differentiated():
    late, calls = Late(), []

    def noted(y, x, batch):
        late.log.append(("step", len(calls)))
        calls.append(None)
        return loss(y, x, batch)

    problem, x, y, batches = setup()
    problem = dataclasses.replace(problem, inner_loss=noted)
    with offload.on_a_device(late):
        bl.hypergradient(
            problem, x, y, batches, solver=bl.Descent(bl.SGD(0.1), 6), estimator=bl.Unrolled("iterates", offload=True)
        )
    kinds = [kind for kind, _ in late.log]
    assert kinds.count("away") == kinds.count("back") == 5  # the last one is needed at once, and stays
    assert kinds.count("wait") == 10
    begun = {number: place for place, (kind, number) in enumerate(late.log) if kind in ("away", "back")}
    waited = {number: place for place, (kind, number) in enumerate(late.log) if kind == "wait"}
    for number, place in begun.items():
        assert "step" in kinds[place : waited[number]], "nothing was computed while it was copied"
    back = [number for kind, number in late.log if kind == "back"]
    assert all(waited[one] < begun[other] for one, other in itertools.pairwise(back)), "two were ahead"


def test_a_tensor_that_no_step_changes_is_copied_once():
    late = Late()
    with offload.on_a_device(late):
        found(bl.Unrolled("iterates", offload=True), bl.SGD(lr=0.1), steps=6)
    assert len(late.buffers) == 5 * 2 + 1
    assert late.alive() == 0


@dataclasses.dataclass(frozen=True)
class InPlace(bl.Optimizer):
    """From some step on it changes its state in place, which the checks of the first step do not see."""

    after: int

    def init(self, inner):
        return {"t": torch.zeros(3, dtype=DOUBLE)}

    def step(self, grad, state, inner, outer):
        moved = {name: leaf - 0.1 * grad[name] for name, leaf in inner.items() if grad[name] is not None}
        if float(state["t"][0]) < self.after:
            return inner | moved, {"t": state["t"] + 1}
        return inner | moved, {"t": state["t"].add_(1)}


@pytest.mark.parametrize("keep", ["iterates", "segments"])
@pytest.mark.parametrize("after", [1, 2, 3, 4, 5])
def test_a_step_that_changes_what_was_kept_is_refused(lane, keep, after):
    with pytest.raises(ValueError, match="changed the inner variable or its state in place"):
        found(bl.Unrolled(keep, offload=True), InPlace(after))


def test_copies_that_an_error_leaves_behind_are_waited_for():
    late = Late()

    def failing(y, x, batch):
        if len(late.log) > 6:
            raise KeyError("no such row")
        return loss(y, x, batch)

    problem, x, y, batches = setup()
    with offload.on_a_device(late), pytest.raises(KeyError):
        bl.hypergradient(
            dataclasses.replace(problem, inner_loss=failing),
            *(x, y, batches),
            solver=bl.Descent(bl.SGD(0.1), 9),
            estimator=bl.Unrolled("iterates", offload=True),
        )
    assert late.alive() == 0
    assert late.queue == []


# --- blocks


def layer(h, w):
    return torch.tanh(h @ w) + 0.3 * h


def orders(function, leaves, order=2):
    value = function(*leaves)
    got = [value.detach()]
    for each in range(order):
        gradient = torch.autograd.grad(value, leaves, create_graph=each + 1 < order, allow_unused=True)
        got += gradient
        value = sum(g.square().sum() for g in gradient if g is not None and g.requires_grad)
    return [each if each is None else each.detach() for each in got]


def stack(make, h, w):
    block = make(layer)
    for _ in range(4):
        h = block(h * 1.5, w)
    return h.square().sum()


def noisy(make, h, w):
    block = make(lambda h, w: F.dropout(layer(h, w), 0.4) + F.gelu(F.linear(h, w)))
    return block(block(block(h, w), w), w).square().sum()


def nested(make, h, w):
    inner = make(layer)
    outer = make(lambda h: inner(inner(h, w), w))
    return outer(inner(outer(h * 1.0), w)).square().sum()


def several(make, h, w):
    block = make(lambda h, k, w: (torch.tanh(h @ w) * k, {"k": k + h.sin()}))
    first, rest = block(h * 1.0, h * 2.0, w)
    second, rest = block(first, rest["k"], w)
    return make(lambda a, b, c: a * b + c)(second, rest["k"], second).square().sum()


def mapped(make, h, w):
    block = make(lambda h: F.dropout(layer(h, w), 0.2))
    return torch.func.vmap(lambda h: block(block(block(h))), randomness="different")(h * 1.0).square().sum()


def computed_and_not_given(make, h, w):
    v = w.exp()
    return make(lambda h: torch.tanh(h @ v))(h * 1.0).square().sum()


@pytest.mark.parametrize("function", [stack, noisy, nested, several, mapped, computed_and_not_given])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_derivatives_through_blocks_are_those_of_autograd(lane, function, order):
    if order == 3 and function not in (stack, noisy, several):
        pytest.skip("of tensors that are not given, refused as without offload")
    results = []
    for make in (lambda f: f, lambda f: bl.rematerialize(f, offload=True)):
        torch.manual_seed(0)
        leaves = tensor(4, 3).requires_grad_(), tensor(3, 3, seed=1).requires_grad_()
        results.append((orders(lambda *x, make=make: function(make, *x), leaves, order), torch.get_rng_state()))
    (theirs, expected), (ours, state) = results
    assert torch.equal(state, expected)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-12 * max(1.0, float(b.norm()))


def test_a_graph_can_be_used_again(lane):
    leaves = tensor(4, 3).requires_grad_(), tensor(3, 3, seed=1).requires_grad_()
    value = stack(lambda f: bl.rematerialize(f, offload=True), *leaves)
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    gradient = torch.autograd.grad(value, leaves, create_graph=True)
    product = torch.autograd.grad(gradient[0].square().sum(), leaves, retain_graph=True)
    again = torch.autograd.grad(gradient[0].square().sum(), leaves)
    assert all(map(torch.equal, first, gradient))
    assert all(map(torch.equal, product, again))


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.widen, self.narrow = (
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
        )

    def forward(self, h):
        return h + self.narrow(F.dropout(F.gelu(self.widen(self.norm(h))), 0.1))


def deep(depth, width=8, rows=4, *, tasks=None, **options):
    """A problem of a deep net, and its variables."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, width), *[Residual(width) for _ in range(depth)], nn.Linear(width, 1)).double()
    call, params = bl.functional(net, requires_grad=False, **options)

    def weighted(y, x, inputs):
        return (x.sigmoid() * call(y, inputs).square().mean(1)).mean()

    inputs = tensor(rows, 3) if tasks is None else tensor(tasks, rows, 3)
    if tasks is not None:
        params = {name: leaf.expand(tasks, *leaf.shape) for name, leaf in params.items()}
    return bl.Problem(weighted, weighted), tensor(rows, seed=5), params, bl.Batches(inputs, inputs)


@pytest.mark.parametrize("keep", ["graph", "iterates", "segments"])
@pytest.mark.parametrize("tasks", [None, 2])
def test_the_hypergradient_through_blocks_is_that_of_autograd(lane, keep, tasks):
    results = []
    for options in ({}, {"rematerialize": Residual, "offload": True}):
        torch.manual_seed(3)
        problem, x, y, batches = deep(3, tasks=tasks, **options)
        estimator = bl.Unrolled(keep, offload=keep != "graph" and bool(options))
        estimator = estimator if tasks is None else bl.TaskMean(estimator)
        hg = bl.hypergradient(problem, x, y, batches, solver=bl.Descent(bl.SGD(0.1), 3), estimator=estimator)
        results.append((hg, torch.get_rng_state()))
    same(*reversed(results))


def test_the_inputs_of_the_next_block_are_on_their_way_while_one_is_differentiated():
    late = Late()

    def noted(h, w):
        late.log.append(("block", 0))
        return layer(h, w)

    block = bl.rematerialize(noted, offload=True)
    h, w = tensor(4, 3).requires_grad_(), tensor(3, 3, seed=1).requires_grad_()
    with offload.on_a_device(late):
        v = h * 1.0
        for _ in range(5):
            v = block(v, w)
        value = v.sum()
        del v
        torch.autograd.grad(value, (h, w))
    kinds = [kind for kind, _ in late.log]
    begun = {number: place for place, (kind, number) in enumerate(late.log) if kind in ("away", "back")}
    waited = {number: place for place, (kind, number) in enumerate(late.log) if kind == "wait"}
    back = [number for kind, number in late.log if kind == "back"]
    assert kinds.count("away") == len(back) == 5
    assert all("block" in kinds[begun[number] : waited[number]] for number in back[2:])
    assert late.alive() == 0
    assert rematerialize._store.last is None


def test_an_input_that_is_changed_while_it_is_copied_is_refused():
    block = bl.rematerialize(layer, offload=True)
    h, w = tensor(4, 3).requires_grad_(), tensor(3, 3, seed=1).requires_grad_()
    with offload.on_a_device(Late()):
        first = h * 1.0
        second = block(first, w)
        first.detach().add_(1.0)
        with pytest.raises(ValueError, match="layer was changed in place"):
            block(second, w)


def test_hooks_of_the_users_own_have_the_inputs():
    late = Late()
    h, w = tensor(4, 3).requires_grad_(), tensor(3, 3, seed=1).requires_grad_()
    with offload.on_a_device(late), torch.autograd.graph.save_on_cpu():
        orders(lambda *x: stack(lambda f: bl.rematerialize(f, offload=True), *x), (h, w), 1)
    assert late.made == 0


# --- memory


def peak(estimator, steps, *, away=True, width=64, optimizer=None):
    def mlp(y, x, inputs):
        return (x.sigmoid() * torch.tanh(inputs @ y["a"]).square().mean(1)).mean()

    y = {"a": tensor(width, width), "b": tensor(width, seed=1)}
    problem = bl.Problem(mlp, lambda y, x, inputs: mlp(y, x, inputs) + y["b"].sum())
    batches = bl.Batches(tensor(4, width), tensor(4, width))
    gc.collect()
    with offload.on_a_device() if away else contextlib.nullcontext(), Tensors() as meter:
        bl.hypergradient(
            *(problem, tensor(4), y, batches),
            solver=bl.Descent(optimizer or bl.SGD(0.1, momentum=0.9), steps),
            estimator=estimator,
        )
    return meter.peak_bytes


@pytest.mark.parametrize("keep", ["iterates", "segments"])
def test_the_peak_of_a_device_does_not_grow_with_the_steps(keep):
    peaks = [peak(bl.Unrolled(keep, offload=True), steps) for steps in (10, 20, 60)]
    iterate = 2 * 64 * 64 * 8  # with the momentum
    assert max(peaks) - min(peaks) < 0.1 * iterate
    # The control: what stays on the device is counted.
    grown = [peak(bl.Unrolled("iterates", offload=True), steps, away=False) for steps in (10, 60)]
    assert grown[1] - grown[0] == pytest.approx(50 * iterate, rel=0.05)
    assert grown == [peak(bl.Unrolled("iterates"), steps) for steps in (10, 60)]
    assert min(peaks) > 5 * iterate / 2


def gradient_peak(depth, order, *, leaves=True):
    h, w = tensor(64, 128).requires_grad_(), tensor(128, 128, seed=1).requires_grad_()
    block = bl.rematerialize(layer, offload=leaves)
    gc.collect()
    with offload.on_a_device(), Tensors() as meter:
        v = h * 1.0
        for _ in range(depth):
            v = block(v, w)
        value = v.square().sum()
        del v
        for each in range(order):
            gradient = torch.autograd.grad(value, h, create_graph=each + 1 < order)
            value = None if each + 1 == order else gradient[0].square().sum()
            del gradient
    return meter.peak_bytes / (64 * 128 * 8)


def test_the_peak_of_a_gradient_does_not_grow_with_the_blocks():
    """But for the 5,056 bytes of a generator's state, which is on the host anyway."""
    random = 5056 / (64 * 128 * 8)
    slopes = [
        (gradient_peak(24, 1, leaves=leaves) - gradient_peak(8, 1, leaves=leaves)) / 16 for leaves in (True, False)
    ]
    assert slopes[0] == pytest.approx(random, abs=0.01)
    assert slopes[1] == pytest.approx(1 + random, abs=0.01)


def test_the_peak_of_a_product_grows_by_the_cotangents_that_autograd_holds():
    slopes = [
        (gradient_peak(24, 2, leaves=leaves) - gradient_peak(8, 2, leaves=leaves)) / 16 for leaves in (True, False)
    ]
    assert slopes[0] < 1.15
    assert slopes[1] > 1.9


def posed(device):
    problem, x, y, batches = setup()
    move = lambda value: bl.space.tree.tree_map(lambda leaf: leaf.to(device), value)  # noqa: E731
    return problem, move(x), move(y), bl.Batches(move(batches.inner), move(batches.outer))


def forecast_peak(device, steps, **fields):
    case = Case(
        posed, solver=bl.Descent(bl.SGD(0.1), steps), estimator=bl.Unrolled("iterates", **fields), device=device
    )
    return forecast(case).peak_tensor_bytes


@pytest.mark.skipif(torch.cuda.is_available(), reason="a forecast for a GPU that is not there")
def test_a_forecast_for_a_gpu_does_not_count_what_is_offloaded():
    assert forecast_peak("cuda", 40, offload=True) == forecast_peak("cuda", 20, offload=True)
    assert forecast_peak("cuda", 40) > forecast_peak("cuda", 20)


def test_a_forecast_for_a_cpu_counts_what_stays():
    assert forecast_peak("cpu", 20, offload=True) == forecast_peak("cpu", 20)
    case = Case(posed, solver=bl.Descent(bl.SGD(0.1), 20), estimator=bl.Unrolled("iterates", offload=True))
    assert forecast(case).peak_tensor_bytes == measure(case, errors=False).peak_tensor_bytes


# --- arguments


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bl.Unrolled(offload=True), ValueError, r'Unrolled\("iterates", offload=True\)'),
        (lambda: bl.Unrolled("iterates", offload=1), ValueError, "True or False"),
        (lambda: bl.rematerialize(layer, offload="yes"), TypeError, "True or False"),
        (lambda: bl.functional(nn.Linear(2, 2), offload=True), ValueError, "without rematerialize"),
        (lambda: bl.functional(nn.Linear(2, 2), rematerialize=nn.Linear, offload=0), TypeError, "True or False"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- on a GPU


@cuda
@pytest.mark.parametrize("keep", ["iterates", "segments"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_on_a_gpu_the_hypergradient_is_that_of_the_graph(keep, optimizer):
    results = []
    for estimator in (bl.Unrolled(keep, offload=True), bl.Unrolled()):
        problem, x, y, batches = posed("cuda")
        solver = bl.Descent(OPTIMIZERS[optimizer], 30)
        results.append(bl.hypergradient(problem, x, y, batches, solver=solver, estimator=estimator))
    for a, b in zip(*(bl.space.tree.tensors(hg.grad) for hg in results), strict=True):
        assert (a - b).norm() <= 1e-10 * max(1.0, float(b.norm()))


@cuda
@pytest.mark.parametrize("order", [1, 2])
def test_on_a_gpu_derivatives_through_blocks_are_those_of_autograd(order):
    leaves = [tensor(256, 512).cuda().requires_grad_(), (tensor(512, 512, seed=1) / 30).cuda().requires_grad_()]
    ours = orders(lambda *x: stack(lambda f: bl.rematerialize(f, offload=True), *x), leaves, order)
    theirs = orders(lambda *x: stack(lambda f: f, *x), leaves, order)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-10 * max(1.0, float(b.norm()))


@cuda
def test_on_a_gpu_the_allocated_peak_does_not_grow_with_the_steps():
    def allocated(steps, **fields):
        g = torch.Generator("cuda").manual_seed(0)
        y = torch.randn(1024, 1024, device="cuda", generator=g) / 32
        rows = torch.randn(64, 1024, device="cuda", generator=g)

        def mlp(y, x, batch):
            return (x.sigmoid() * torch.tanh(rows @ y).square().mean(1)).mean()

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        hg = bl.hypergradient(
            *(bl.Problem(mlp, mlp), torch.zeros(64, device="cuda"), y, bl.Batches(None, None)),
            solver=bl.Descent(bl.SGD(0.1), steps),
            estimator=bl.Unrolled("iterates", **fields),
        )
        return torch.cuda.max_memory_allocated() - before, hg.grad

    allocated(3, offload=True)
    (less, _), (more, ours), (_, theirs) = (
        *(allocated(steps, offload=True) for steps in (10, 50)),
        allocated(50),
    )
    assert more - less < 2**20
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
