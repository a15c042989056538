"""keep="auto": the least compute that a byte budget allows, by forecast, and the numbers of keep="graph"."""

import contextlib
import subprocess
import sys

import pytest
import torch
from bilevel_profiling import Case, ForecastError, forecast
from bilevel_profiling.meters.tensors import Tensors
from torch import nn
from torch.nn import functional as F

import bilevel as bl
from bilevel.engine import offload
from bilevel.estimators.reverse import auto

DOUBLE = torch.float64
PLENTY = 10**12


def tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def loss(y, x, batch):
    inputs, targets = batch
    hidden = F.dropout(torch.tanh(inputs @ y["a"]), 0.3 if "noise" in y else 0.0)
    return (x["weights"].sigmoid() * (hidden @ y["b"] - targets).square().mean(1)).mean() + 0.1 * y["b"].square().mean()


def setup(*, noise=False, init=False, tasks=None, rows=6):
    def given(*shape, seed):
        return tensor(*(shape if tasks is None else (tasks, *shape)), seed=seed)

    x = {"weights": tensor(rows, seed=1)}
    y = {"a": given(4, 8, seed=2) / 2, "b": given(8, 2, seed=3) / 2}
    y |= {"noise": given(1, seed=8)} if noise else {}
    if init:
        x |= {"start": {name: leaf[0] if tasks else leaf for name, leaf in y.items()}}
    problem = bl.Problem(loss, loss, init=(lambda x, batch: dict(x["start"])) if init else None)
    inner, outer = ((given(rows, 4, seed=k), given(rows, 2, seed=k + 1)) for k in (4, 6))
    return problem, x, None if init else y, bl.Batches(inner, outer, curvature=outer)


def found(estimator, *, solver=None, posed=None, steps=9, optimizer=None, **options):
    problem, x, y, batches = posed or setup(**options)
    torch.manual_seed(0)
    solver = solver or bl.Descent(optimizer or bl.SGD(lr=0.3, momentum=0.8), steps)
    return bl.hypergradient(problem, x, y, batches, solver=solver, estimator=estimator), torch.get_rng_state()


def same(ours, theirs):
    assert torch.equal(ours[1], theirs[1])
    for one, other in ((ours[0].grad, theirs[0].grad), (ours[0].inner, theirs[0].inner)):
        pairs = zip(bl.space.tree.tensors(one), bl.space.tree.tensors(other), strict=True)
        for a, b in pairs:
            assert (a - b).norm() <= 1e-12 * max(1.0, float(b.norm()))


def choices(**options):
    """What can be chosen, and the bytes of each."""
    return found(bl.Unrolled("auto", budget=PLENTY), **options)[0].stats["keep_peaks"]


@pytest.fixture(scope="module")
def long():
    """A problem of many steps, asked once."""
    posed = setup()
    return posed, choices(posed=posed, steps=20)


# --- the choice


def test_with_plenty_of_memory_the_graph_is_kept():
    stats = found(bl.Unrolled("auto", budget=PLENTY))[0].stats
    assert stats["keep"] == "graph"
    assert list(stats["keep_peaks"]) == ["graph", "iterates", "segments"]


@pytest.mark.parametrize("name", ["graph", "iterates", "segments"])
def test_the_least_compute_that_fits_is_chosen(long, name):
    posed, peaks = long
    assert peaks["graph"] > peaks["iterates"] > peaks["segments"]
    assert found(bl.Unrolled("auto", budget=peaks[name]), posed=posed, steps=20)[0].stats["keep"] == name
    exceeded = list(peaks)[list(peaks).index(name) + 1 :]
    if exceeded:
        stats = found(bl.Unrolled("auto", budget=peaks[name] - 1), posed=posed, steps=20)[0].stats
        assert stats["keep"] == exceeded[0]


def test_offload_comes_before_segments_where_variables_can_leave():
    posed = setup()
    with offload.on_a_device():
        peaks = choices(posed=posed, steps=20)
        assert list(peaks) == ["graph", "iterates", "iterates, offload", "segments"]
        budget = max(peaks["iterates, offload"], peaks["segments"])
        stats = found(bl.Unrolled("auto", budget=budget), posed=posed, steps=20)[0].stats
    assert stats["keep"] == "iterates, offload"


@pytest.mark.parametrize("name", ["graph", "iterates", "segments", "iterates, offload"])
@pytest.mark.parametrize("options", [{}, {"noise": True}, {"init": True}], ids=["plain", "dropout", "init"])
def test_a_run_takes_what_was_forecast(name, options):
    keep, _, leaves = name.partition(", ")
    with offload.on_a_device():
        peaks = choices(**options)
        problem, x, y, batches = setup(**options)
        estimator = bl.Unrolled(keep, offload=bool(leaves))
        torch.manual_seed(0)
        for _ in range(2):  # (the first call asks what is remembered)
            with Tensors() as meter:
                solver = bl.Descent(bl.SGD(lr=0.3, momentum=0.8), 9)
                bl.hypergradient(problem, x, y, batches, solver=solver, estimator=estimator)
    assert meter.peak_bytes == pytest.approx(peaks[name], rel=0.01)


def test_nothing_that_fits_is_refused_before_anything_is_computed(monkeypatch):
    peaks, computed = choices(), []

    def noted(y, x, batch):
        if type(batch[0]) is torch.Tensor and type(y["a"]) is torch.Tensor:
            computed.append(1)
        return loss(y, x, batch)

    monkeypatch.setattr(auto, "switched", lambda *, on, before=auto.switched: computed.clear() or before(on=on))
    _, x, y, batches = setup()
    with pytest.raises(ValueError, match="budget of 1,000 bytes") as caught:
        found(bl.Unrolled("auto", budget="1kB"), posed=(bl.Problem(noted, noted), x, y, batches))
    for name, peak in peaks.items():
        assert f"{name} {peak:,}" in str(caught.value)
    assert "segments" in str(caught.value)
    assert computed == []


# --- the numbers


CASES = {
    "plain": ({}, {}),
    "dropout": ({"noise": True}, {}),
    "init": ({"init": True}, {}),
    "Adam": ({"optimizer": bl.Adam(lr=0.05)}, {}),
    "last": ({}, {"last": 4}),
    "step weights": ({}, {"step_weights": (0, 0, 0, 0.2, 0, 0, 0.3, 0, 0.5)}),
    "converge": ({"solver": bl.Converge(bl.SGD(lr=0.2), tol=0.05, max_steps=12)}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_hypergradient_is_that_of_the_graph(case):
    options, fields = CASES[case]
    posed = setup(rows=128, **{name: value for name, value in options.items() if name in ("noise", "init")})
    moves = {name: value for name, value in options.items() if name not in ("noise", "init")}
    chosen = set()
    with offload.on_a_device():
        theirs = found(bl.Unrolled(**fields), posed=posed, **moves)
        peaks = found(bl.Unrolled("auto", budget=PLENTY, **fields), posed=posed, **moves)[0].stats["keep_peaks"]
        for budget in peaks.values():
            ours = found(bl.Unrolled("auto", budget=budget, **fields), posed=posed, **moves)
            chosen.add(ours[0].stats["keep"])
            same(ours, theirs)
    assert len(chosen) > 1


@pytest.mark.parametrize(("chunk", "init"), [(None, False), (1, True), (2, True)])
def test_of_tasks(chunk, init):
    posed = setup(tasks=4, init=init, rows=32)
    theirs = found(bl.TaskMean(bl.Unrolled(), chunk), posed=posed)
    ours = found(bl.TaskMean(bl.Unrolled("auto", budget=PLENTY), chunk), posed=posed)
    same(ours, theirs)
    peaks = ours[0].stats["keep_peaks"]
    assert ours[0].stats["keep"] == "graph"
    ours = found(bl.TaskMean(bl.Unrolled("auto", budget=peaks["segments"]), chunk), posed=posed)
    assert ours[0].stats["keep"] == "segments"
    same(ours, theirs)


def test_of_resampled_curvature():
    ours = found(bl.Unrolled("auto", budget=PLENTY, resampled=True))
    assert list(ours[0].stats["keep_peaks"]) == ["iterates", "segments"]
    same(ours, found(bl.Unrolled("iterates", resampled=True)))


def test_calls_of_the_forecast_are_not_counted():
    assert found(bl.Unrolled("auto", budget=PLENTY))[0].stats["calls"] == found(bl.Unrolled())[0].stats["calls"]


# --- blocks


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h):
        return h + self.narrow(F.dropout(F.gelu(self.widen(h)), 0.1))


def deep(depth=4, rows=256, width=8):
    torch.manual_seed(0)
    net = nn.Sequential(*[Residual(width) for _ in range(depth)], nn.Linear(width, 1)).double()
    call, params = bl.functional(net, requires_grad=False, rematerialize=Residual)

    def weighted(y, x, inputs):
        return (x.sigmoid() * call(y, inputs).square().mean(1)).mean()

    return (
        bl.Problem(weighted, weighted),
        tensor(rows),
        params,
        bl.Batches(tensor(rows, width), tensor(rows, width)),
    ), net


def test_blocks_are_run_as_such_where_the_budget_needs_it():
    posed, _ = deep()
    solver = bl.Descent(bl.SGD(0.1), 3)
    plenty = found(bl.Unrolled("auto", budget=PLENTY), posed=posed, solver=solver)
    peaks = plenty[0].stats["keep_peaks"]
    assert plenty[0].stats["keep"] == "graph"
    assert {*peaks} == {way + blocks for way in ("graph", "iterates", "segments") for blocks in ("", ", blocks")}
    assert peaks["iterates, blocks"] < peaks["iterates"]
    names = set()
    for budget in {*peaks.values()}:
        ours = found(bl.Unrolled("auto", budget=budget), posed=posed, solver=solver)
        names.add(ours[0].stats["keep"])
        same(ours, plenty)
    assert {"graph", "graph, blocks"} <= names
    assert names & {"iterates, blocks", "segments, blocks"}


def test_a_run_in_blocks_takes_what_was_forecast():
    posed, _ = deep()
    solver = bl.Descent(bl.SGD(0.1), 3)
    peaks = found(bl.Unrolled("auto", budget=PLENTY), posed=posed, solver=solver)[0].stats["keep_peaks"]
    chosen = set()
    for budget in peaks.values():
        with Tensors() as meter:
            stats = found(bl.Unrolled("auto", budget=budget), posed=posed, solver=solver)[0].stats
        chosen.add(stats["keep"])
        assert meter.peak_bytes == pytest.approx(peaks[stats["keep"]], rel=0.01)
    assert len(chosen) > 2


# --- what is remembered


@pytest.fixture
def forecasts(monkeypatch):
    made, peak = [], auto._peak
    monkeypatch.setattr(auto, "_peak", lambda *args, **options: made.append(1) or peak(*args, **options))
    return made


def test_the_forecast_is_made_once(forecasts):
    posed = setup()
    for budget in (PLENTY, "1GiB", PLENTY):
        found(bl.Unrolled("auto", budget=budget), posed=posed)
    assert len(forecasts) == 3


def test_and_again_for_other_shapes_steps_solvers_and_modes(forecasts):
    posed, net = deep(1, rows=8)
    blocks, x, y, batches = posed
    more = bl.Batches(tensor(8, 8), tensor(8, 8).expand(2, 8, 8).reshape(-1, 8))

    def asked(steps=2, posed=posed, solver=None, **options):
        before = len(forecasts)
        found(bl.Unrolled("auto", budget=PLENTY, **options), posed=posed, solver=solver, steps=steps)
        return len(forecasts) > before

    problem = bl.Problem(blocks.inner_loss, lambda y, x, inputs: blocks.outer_loss(y, x, inputs[:8]))
    posed = problem, x, y, batches
    assert asked(posed=posed)
    assert not asked(posed=posed)
    assert asked(posed=posed, steps=3)
    assert asked(posed=posed, solver=bl.Descent(bl.Adam(0.1), 2))
    assert asked(posed=posed, last=1)
    assert asked(posed=(problem, x, y, more))
    net.eval()
    assert asked(posed=posed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert asked(posed=posed)
    net.train()
    assert not asked(posed=posed)


class Made:
    """Batches that are made when they are asked for."""

    def __init__(self, rows):
        self.rows, self.asked = rows, 0

    def __len__(self):
        return 100

    def __getitem__(self, step):
        self.asked += 1
        return torch.rand(self.rows, 4, dtype=DOUBLE), torch.zeros(self.rows, 2, dtype=DOUBLE) + step


@pytest.mark.parametrize("ready", [True, False])
def test_batches_of_each_step(ready):
    problem, x, y, batches = setup(rows=64)
    torch.manual_seed(5)
    made = Made(64)
    inner = bl.PerStep([made[step] for step in range(9)] if ready else made)
    torch.manual_seed(5)
    made.asked = 0
    posed = problem, x, y, bl.Batches(inner, batches.outer)
    ours = found(bl.Unrolled("auto", budget=PLENTY), posed=posed)
    asked = made.asked
    if not ready:
        assert asked < 40, "the batches were made again for each choice"
    same(ours, found(bl.Unrolled(), posed=posed))
    peaks = ours[0].stats["keep_peaks"]
    for name in peaks:
        with Tensors() as meter:
            found(bl.Unrolled(name), posed=posed)
        assert meter.peak_bytes == pytest.approx(peaks[name], rel=0.01)


# --- inside a forecast, without one, and bad input


@pytest.mark.parametrize("budget", [PLENTY, 20_000, 12_000])
def test_a_forecast_of_it_is_that_of_what_it_chooses(budget):
    def case(estimator):
        return Case(lambda device: setup(), solver=bl.Descent(bl.SGD(0.1), 20), estimator=estimator)

    problem, x, y, batches = setup()
    solver = bl.Descent(bl.SGD(0.1), 20)
    estimator = bl.Unrolled("auto", budget=budget)
    name = bl.hypergradient(problem, x, y, batches, solver=solver, estimator=estimator).stats["keep"]
    ours, theirs = forecast(case(estimator)), forecast(case(bl.Unrolled(name)))
    assert ours.peak_tensor_bytes == theirs.peak_tensor_bytes
    assert ours.calls == theirs.calls


def test_a_loss_that_reads_numbers_is_refused_with_the_remedy():
    problem = bl.Problem(
        lambda y, x, b: y.square().sum() * float(x.sum().detach().item()), lambda y, x, b: (y * x).sum()
    )
    with pytest.raises(ForecastError, match="item") as caught:
        bl.hypergradient(
            *(problem, tensor(2), tensor(2), bl.Batches(None, None)),
            solver=bl.Descent(bl.SGD(0.1), 2),
            estimator=bl.Unrolled("auto", budget=PLENTY),
        )
    assert any('Unrolled("graph")' in note for note in caught.value.__notes__)


def test_importing_the_library_and_a_hypergradient_do_without_the_profiler():
    code = """
import sys, torch, bilevel as bl
problem = bl.Problem(lambda y, x, b: y**2 - x * y, lambda y, x, b: y**2 / 2)
x, y, batches, solver = torch.tensor(1.0), torch.tensor(0.0), bl.Batches(None, None), bl.Descent(bl.SGD(0.1), 2)
bl.hypergradient(problem, x, y, batches, solver=solver, estimator=bl.Unrolled("iterates", offload=True))
assert not [name for name in sys.modules if name.startswith("bilevel_profiling")]
sys.modules["bilevel_profiling"] = None
try:
    bl.Unrolled("auto", budget="1GiB")
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'Unrolled("graph")' in done.stdout


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": "auto"}, 'Unrolled\\("auto", budget="2GiB"\\)'),
        ({"keep": "auto", "budget": "two"}, "is no size"),
        ({"keep": "auto", "budget": 0}, "is no size"),
        ({"keep": "auto", "budget": True}, "bytes or a size"),
        ({"keep": "auto", "budget": 1.5}, "bytes or a size"),
        ({"keep": "auto", "budget": "1GiB", "offload": True}, "chooses whether to"),
        ({"keep": "auto", "budget": "1GiB", "segment": 3}, 'keep="segments"'),
        ({"keep": "iterates", "budget": "1GiB"}, "chooses how to keep"),
        ({"keep": "least"}, "'auto'"),
    ],
)
def test_bad_input(fields, message):
    with pytest.raises(ValueError, match=message):
        bl.Unrolled(**fields)


def test_it_promises_no_growth():
    assert bl.Unrolled("auto", budget=1).memory_growth == ""
    with contextlib.suppress(ValueError):
        found(bl.Unrolled("auto", budget=1))
