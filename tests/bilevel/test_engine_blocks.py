"""Rematerialized blocks under the compiled engine, and the recording of functions: the same numbers as eager ones."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bilevel as bl
from bilevel.engine.compiled.captured import recorded


class Residual(nn.Module):
    def __init__(self, width, chance=0.2):
        super().__init__()
        self.norm, self.widen, self.narrow = (
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
        )
        self.drop = nn.Dropout(chance)

    def forward(self, h):
        return h + self.narrow(self.drop(F.gelu(self.widen(self.norm(h)))))


def posed(block=Residual, depth=3, dtype=torch.float64, rematerialize=True, **arguments):
    """A net of blocks, its problem, x, y and batches of one size."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), *[block(6, **arguments) for _ in range(depth)], nn.Linear(6, 3)).to(dtype)
    call, params = bl.functional(net, requires_grad=False, rematerialize=block if rematerialize else None)
    inputs, labels = torch.randn(10, 4, dtype=dtype), torch.arange(10) % 3
    problem = bl.Problem(
        lambda y, x, b: (x.sigmoid() * F.cross_entropy(call(y, b[0]), b[1], reduction="none")).mean(),
        lambda y, x, b: F.cross_entropy(call(y, b[0]), b[1]),
    )
    return net, problem, torch.zeros(10, dtype=dtype), params, bl.Batches((inputs, labels), (inputs.flip(0), labels))


def hypergradient(problem, x, y, batches, engine=None, estimator=None, steps=3, seed=1):
    torch.manual_seed(seed)
    solver = bl.Descent(bl.SGD(lr=0.1, momentum=0.5), steps)
    found = bl.hypergradient(
        problem, x, y, batches, solver=solver, estimator=estimator or bl.Unrolled("iterates"), engine=engine
    )
    return found, torch.get_rng_state()


GRAPH = bl.Compiled(backend="graph")


@pytest.mark.parametrize(
    "estimator",
    [bl.Unrolled(), bl.Unrolled("iterates"), bl.Unrolled("segments"), bl.Implicit(bl.Neumann(4, 0.1)), bl.FirstOrder()],
    ids=["graph", "iterates", "segments", "implicit", "first order"],
)
def test_compiled_blocks_are_the_blocks(estimator):
    _, problem, x, y, batches = posed()
    if isinstance(estimator, bl.FirstOrder):
        problem = bl.Problem(problem.outer_loss, problem.outer_loss, init=lambda x, b: x)
        x, y = y, None
    eager, after = hypergradient(problem, x, y, batches, estimator=estimator)
    for _ in range(2):
        found, generators = hypergradient(problem, x, y, batches, GRAPH, estimator)
        for one, other in zip(
            torch.utils._pytree.tree_leaves(found.grad), torch.utils._pytree.tree_leaves(eager.grad), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-13)
        assert found.status is eager.status
        assert torch.equal(generators, after)
    names = {row["name"] for row in found.stats["engine"]["functions"] if row["calls"]}
    assert "pulled of block Residual" in names
    assert not any(row["new"] for row in found.stats["engine"]["functions"])


def test_the_whole_loss_is_not_traced_where_it_has_blocks():
    _, problem, x, y, batches = posed()
    found, _ = hypergradient(problem, x, y, batches, GRAPH)
    assert {row["name"].split(" of ")[1] for row in found.stats["engine"]["functions"]} == {"block Residual"}


def test_blocks_that_auto_switches_off_are_compiled_with_the_rest():
    _, problem, x, y, batches = posed(chance=0.0)
    eager, _ = hypergradient(problem, x, y, batches)
    for budget, owner in (("1GiB", "inner_loss"), (None, "block Residual")):
        estimator = bl.Unrolled("auto", budget=budget) if budget else bl.Unrolled("iterates")
        found, _ = hypergradient(problem, x, y, batches, GRAPH, estimator)
        torch.testing.assert_close(found.grad, eager.grad, rtol=1e-10, atol=1e-13)
        assert any(row["name"].endswith(owner) and row["calls"] for row in found.stats["engine"]["functions"])


def test_a_block_that_uses_more_than_its_inputs_stays_eager():
    shared = nn.Linear(6, 6).double()

    class Outside(Residual):
        def forward(self, h):
            return super().forward(shared(h))

    _, problem, x, y, batches = posed(Outside)
    eager, _ = hypergradient(problem, x, y, batches)
    for _ in range(2):
        found, _ = hypergradient(problem, x, y, batches, GRAPH)
        torch.testing.assert_close(found.grad, eager.grad, rtol=1e-10, atol=1e-13)
    with torch.no_grad():
        shared.weight.mul_(0.5)
    torch.testing.assert_close(
        hypergradient(problem, x, y, batches, GRAPH)[0].grad, hypergradient(problem, x, y, batches)[0].grad
    )


def test_a_block_that_reads_a_constant_reads_it_anew():
    scale = torch.tensor(0.5, dtype=torch.float64)

    class Scaled(Residual):
        def forward(self, h):
            return super().forward(h) * scale

    _, problem, x, y, batches = posed(Scaled)
    hypergradient(problem, x, y, batches, GRAPH)
    scale.fill_(2.0)
    torch.testing.assert_close(
        hypergradient(problem, x, y, batches, GRAPH)[0].grad, hypergradient(problem, x, y, batches)[0].grad
    )


@pytest.mark.parametrize("change", ["eval", "chance"])
def test_a_block_whose_mode_or_numbers_change_is_traced_again(change):
    net, problem, x, y, batches = posed()
    before, _ = hypergradient(problem, x, y, batches, GRAPH)
    for layer in net.modules():
        if isinstance(layer, nn.Dropout):
            layer.train(change != "eval")
            layer.p = 0.5 if change == "chance" else layer.p
    eager, _ = hypergradient(problem, x, y, batches)
    found, _ = hypergradient(problem, x, y, batches, GRAPH)
    torch.testing.assert_close(found.grad, eager.grad, rtol=1e-10, atol=1e-13)
    assert not torch.allclose(found.grad, before.grad)


def test_compiled_blocks_over_tasks():
    _, problem, x, y, batches = posed(chance=0.0)
    tasks = {name: torch.stack([leaf, 2 * leaf]) for name, leaf in y.items()}
    twice = bl.Batches(
        *((torch.stack([b[0], b[0] + 1]), torch.stack([b[1], b[1]])) for b in (batches.inner, batches.outer))
    )
    estimator = bl.TaskMean(bl.Unrolled("iterates"))
    eager, _ = hypergradient(problem, x, tasks, twice, estimator=estimator)
    for _ in range(2):
        found, _ = hypergradient(problem, x, tasks, twice, GRAPH, estimator)
        torch.testing.assert_close(found.grad, eager.grad, rtol=1e-10, atol=1e-13)


def test_a_wrong_compiled_block_is_found(monkeypatch):
    from bilevel.engine.compiled import inductor
    from bilevel.engine.compiled.piece import Made

    def wrong(graph, inputs):
        return Made(lambda *given: tuple(2 * each for each in graph(*given)))

    monkeypatch.setattr(inductor, "make", lambda backend: wrong)
    _, problem, x, y, batches = posed()
    with pytest.raises(bl.EngineMismatchError, match="block Residual"):
        hypergradient(problem, x, y, batches, bl.Compiled())


def test_a_third_derivative_through_a_compiled_block_is_right():
    _, problem, x, y, batches = posed(chance=0.0)

    def penalty(y, x, b):
        loss = problem.inner_loss(y, x, b)
        slopes = torch.autograd.grad(loss, list(y.values()), create_graph=True)
        return loss + 0.1 * sum(slope.square().sum() for slope in slopes)

    penalized = bl.Problem(penalty, problem.outer_loss)
    with pytest.raises(bl.NotTwiceDifferentiableError):  # torch's own layer norm has no right third derivative
        hypergradient(penalized, x, y, batches, GRAPH)


class Tape:
    """Records a function as CUDA graphs do: a replay computes from what stands in the inputs, into the same results."""

    def __init__(self):
        self.replays = 0

    def __call__(self, function):
        results = [each.clone() for each in function()]

        def replay():
            self.replays += 1
            for place, each in zip(results, function(), strict=True):
                place.copy_(each)

        return replay, results


def test_a_recorded_function_reads_each_call_and_keeps_earlier_results():
    tape = Tape()
    run = recorded(lambda a, b: (a + b, a * b), [torch.ones(2), torch.ones(2)], tape).run
    first = run(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))
    second = run(torch.tensor([5.0, 6.0]), torch.tensor([7.0, 8.0]))
    assert [each.tolist() for each in first] == [[4.0, 6.0], [3.0, 8.0]]
    assert [each.tolist() for each in second] == [[12.0, 14.0], [35.0, 48.0]]
    assert tape.replays == 2


def test_what_cannot_be_recorded_runs_without_and_says_so():
    def impossible(function):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    made = recorded(lambda a: (2 * a,), [torch.ones(2)], impossible)
    assert made.run(torch.ones(2))[0].tolist() == [2.0, 2.0]
    assert made.note is not None
    assert "operation not permitted when stream is capturing" in made.note


def test_a_captured_hypergradient_replays_every_function(monkeypatch):
    from bilevel.engine.compiled import captured

    tape = Tape()
    monkeypatch.setattr(captured, "record", tape)
    monkeypatch.setattr(captured, "_elsewhere", lambda tensors: None)
    _, problem, x, y, batches = posed(rematerialize=False)
    eager, after = hypergradient(problem, x, y, batches)
    found, generators = hypergradient(problem, x, y, batches, bl.Captured())
    torch.testing.assert_close(found.grad, eager.grad, rtol=1e-10, atol=1e-13)
    assert torch.equal(generators, after)
    assert tape.replays == sum(row["calls"] for row in found.stats["engine"]["functions"])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rematerialize", [False, True])
@pytest.mark.parametrize("engine", [bl.Captured(), bl.Compiled(backend="graph"), bl.Compiled()], ids=str)
def test_engines_on_cuda(engine, rematerialize):
    _, problem, x, y, batches = posed(rematerialize=rematerialize)
    x, y, batches = torch.utils._pytree.tree_map(
        lambda leaf: leaf.cuda() if isinstance(leaf, torch.Tensor) else leaf, (x, y, (batches.inner, batches.outer))
    )
    batches = bl.Batches(*batches)
    eager, after = hypergradient(problem, x, y, batches)
    for _ in range(3):
        found, generators = hypergradient(problem, x, y, batches, engine)
        torch.testing.assert_close(found.grad, eager.grad, rtol=1e-9, atol=1e-12)
        assert torch.equal(generators, after)
    assert not found.stats["engine"]["notes"]


def test_captured_on_the_cpu_says_that_it_does_not():
    _, problem, x, y, batches = posed()
    found, _ = hypergradient(problem, x, y, batches, bl.Captured())
    torch.testing.assert_close(found.grad, hypergradient(problem, x, y, batches)[0].grad)
    assert ["CUDA graphs need tensors on a CUDA device" in note for note in found.stats["engine"]["notes"]] == [True]
