"""Task weights in TaskMean: papers.md 4.5 f, and every estimator against a loop over tasks."""

import dataclasses
import math

import catalogue
import pytest
import torch
from torch.utils import _pytree as pytree

import bilevel as bl
from bilevel.tasks import TaskResults

D = torch.float64
T = 3


def flat(tree):
    return torch.cat([leaf.reshape(-1) for leaf in pytree.tree_leaves(tree)])


def signed(slopes, weights, x=None, ids=None):
    """Tasks whose hypergradients are the given vectors, whatever x is."""
    slopes = torch.as_tensor(slopes, dtype=D)
    problem = bl.Problem(lambda y, x, b: (y**2).sum(), lambda y, x, b: (b * y).sum(), init=lambda x, b: x)
    return bl.hypergradient(
        problem,
        torch.zeros(slopes.shape[1:], dtype=D) if x is None else x,
        None,
        bl.Batches(inner=slopes, outer=slopes, task_ids=ids),
        solver=bl.Descent(bl.SGD(0.1), 0),
        estimator=bl.TaskMean(bl.Unrolled(), weights=weights),
    )


def meta_tasks():
    problem, outer, _, _ = catalogue.meta_start()
    g = torch.Generator().manual_seed(1)
    X, Y = torch.randn(T, 12, 5, generator=g, dtype=D), torch.randint(0, 3, (T, 12), generator=g)
    return problem, outer, bl.Batches(inner=[X[:, :8], Y[:, :8]], outer=[X[:, 8:], Y[:, 8:]])


def one(batches, i):
    return bl.Batches([leaf[i] for leaf in batches.inner], [leaf[i] for leaf in batches.outer])


# --- papers.md 4.5 f


def test_papers_4_5_f_identical_tasks_are_weighted_alike():
    for weights in (bl.GradientSimilarity(), bl.GradientSimilarity(None), bl.GradientSimilarity(pairwise=True)):
        found = signed([[1.0, 2.0]] * 4, weights)
        torch.testing.assert_close(found.stats["task_weights"], torch.full((4,), 0.25, dtype=D), rtol=1e-14, atol=0)
        assert float(found.stats["effective_tasks"]) == pytest.approx(4.0)
        torch.testing.assert_close(found.grad, torch.tensor([1.0, 2.0], dtype=D))


def test_papers_4_5_f_one_task_against_three():
    """papers.md 4.5 f: cosines 1, 1, 1, -1 and softmax(tau = 1) = 0.319, 0.319, 0.319, 0.043."""
    slopes = [[1.0, 2.0]] * 3 + [[-1.0, -2.0]]
    weights = signed(slopes, bl.GradientSimilarity()).stats["task_weights"]
    torch.testing.assert_close(weights, torch.tensor([0.319, 0.319, 0.319, 0.043], dtype=D), rtol=0, atol=5e-4)
    cosines = torch.tensor([1.0, 1.0, 1.0, -1.0], dtype=D)
    torch.testing.assert_close(weights, torch.softmax(cosines, 0), rtol=1e-14, atol=0)
    found = signed(slopes, bl.GradientSimilarity(temperature=0.5))
    torch.testing.assert_close(found.stats["task_weights"], torch.softmax(cosines / 0.5, 0), rtol=1e-14, atol=0)
    torch.testing.assert_close(found.grad, (torch.softmax(cosines / 0.5, 0) @ torch.tensor(slopes, dtype=D)))

    rectified = signed(slopes, bl.GradientSimilarity(None))
    third = torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.0], dtype=D)
    torch.testing.assert_close(rectified.stats["task_weights"], third, rtol=1e-14, atol=0)
    assert float(rectified.stats["effective_tasks"]) == pytest.approx(3.0)

    pairs = signed(slopes, bl.GradientSimilarity(pairwise=True)).stats["task_weights"]
    expected = torch.softmax(torch.tensor([1 / 3, 1 / 3, 1 / 3, -1.0], dtype=D), 0)
    torch.testing.assert_close(pairs, expected, rtol=1e-14, atol=0)


# --- right for every estimator


def cosines_of(gradients):
    mean = gradients.mean(0)
    return gradients @ mean / gradients.norm(dim=1) / mean.norm()


@pytest.mark.parametrize(
    "estimator",  # (a first round of a single loop is zero here, and so is its similarity to anything)
    [label for label in catalogue.ESTIMATORS if label not in {*catalogue.RANDOM, *catalogue.BY_ROUNDS}],
)
def test_the_weighted_mean_equals_a_loop(estimator):
    problem, outer, batches = meta_tasks()
    solver, estimator = bl.Descent(bl.SGD(0.3), 6), catalogue.ESTIMATORS[estimator]
    loop = [
        bl.hypergradient(problem, outer, None, one(batches, i), solver=solver, estimator=estimator) for i in range(T)
    ]
    gradients = torch.stack([flat(hg.grad) for hg in loop])
    expected = torch.softmax(cosines_of(gradients) / 0.2, 0)
    weighted = bl.TaskMean(estimator, weights=bl.GradientSimilarity(0.2))
    found = bl.hypergradient(problem, outer, None, batches, solver=solver, estimator=weighted)
    torch.testing.assert_close(found.stats["task_weights"], expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(flat(found.grad), expected @ gradients, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(found.outer_loss, torch.stack([hg.outer_loss for hg in loop]).mean())
    torch.testing.assert_close(found.inner_loss, torch.stack([hg.inner_loss for hg in loop]).mean())
    # (Six steps are too few for some: each task's status is the loop's.)
    assert found.status is max((hg.status for hg in loop), key=lambda status: status.code)
    assert found.stats["tasks"] == T
    for name in outer:
        torch.testing.assert_close(found.inner[name], torch.stack([hg.inner[name] for hg in loop]))

    plain = bl.hypergradient(problem, outer, None, batches, solver=solver, estimator=bl.TaskMean(estimator, 1))
    even = bl.TaskMean(estimator, 1, weights=bl.GradientSimilarity(math.inf))
    uniform = bl.hypergradient(problem, outer, None, batches, solver=solver, estimator=even)
    torch.testing.assert_close(flat(uniform.grad), flat(plain.grad), rtol=1e-13, atol=1e-16)
    assert float(uniform.stats["effective_tasks"]) == pytest.approx(T)


def test_a_state_stays_with_its_task_and_given_weights_with_their_ids():
    """Warm starts under weights, tasks in another order at the second call."""
    problem, outer, batches = meta_tasks()
    solver, estimator = bl.Descent(bl.SGD(0.3), 2), bl.MemoryReduced(steps=3, warm_inner=True, warm_adjoint=True)
    importance = {"a": 1.0, "b": 0.0, "c": 7.0, "d": 5.0}
    states, state = dict.fromkeys("abc"), None
    for ids in ("abc", "cab", "cba"):
        order = ["abc".index(task) for task in ids]
        shuffled = bl.Batches(*([leaf[order] for leaf in side] for side in (batches.inner, batches.outer)))
        given = dataclasses.replace(shuffled, task_ids=list(ids))
        found = bl.hypergradient(
            problem,
            outer,
            None,
            given,
            solver=solver,
            estimator=bl.TaskMean(estimator, weights=bl.GivenWeights(importance)),
            state=state,
        )
        state, total = found.state, 0.0
        for place, task in enumerate(ids):
            alone = bl.hypergradient(
                problem, outer, None, one(shuffled, place), solver=solver, estimator=estimator, state=states[task]
            )
            states[task], total = alone.state, total + importance[task] / 8 * flat(alone.grad)
        torch.testing.assert_close(flat(found.grad), total, rtol=1e-10, atol=1e-14)
        expected = torch.tensor([importance[task] / 8 for task in ids], dtype=D)
        torch.testing.assert_close(found.stats["task_weights"], expected)


# --- edges


def test_which_tensors_enter_the_cosine():
    """The body agrees and the head conflicts; a tree of x has names with dots."""
    problem = bl.Problem(
        lambda y, x, b: sum((leaf**2).sum() for leaf in y.values()),
        lambda y, x, b: y["body"].sum() + (b * y["head"]).sum(),
        init=lambda x, b: {"body": x["net"]["0.weight"], "head": x["net"]["1.weight"]},
    )
    x = {"net": {"0.weight": torch.zeros(2, dtype=D), "1.weight": torch.zeros(2, dtype=D)}}
    slopes = torch.tensor([1.0, 1.0, -1.0], dtype=D)
    batches = bl.Batches(inner=slopes, outer=slopes)
    names = []

    def seen(name):
        names.append(name)
        return name.startswith("net.1")

    third = torch.full((3,), 1 / 3, dtype=D)
    conflict = torch.softmax(torch.tensor([1.0, 1.0, -1.0], dtype=D), 0)
    for over, expected in (
        ("net.0", third),
        ("net.1", conflict),
        ("net.1.weight", conflict),
        (["net.0.weight"], third),
        (seen, conflict),
    ):
        found = bl.hypergradient(
            problem,
            x,
            None,
            batches,
            solver=bl.Descent(bl.SGD(0.1), 0),
            estimator=bl.TaskMean(bl.Unrolled(), weights=bl.GradientSimilarity(over=over)),
        )
        torch.testing.assert_close(found.stats["task_weights"], expected, rtol=1e-14, atol=0)
        torch.testing.assert_close(found.grad["net"]["1.weight"], (expected @ slopes).expand(2), rtol=1e-13, atol=1e-16)
    assert set(names) == {"net.0.weight", "net.1.weight"}
    with pytest.raises(ValueError, match=r"selects none of the outer tensors \['net.0.weight', 'net.1.weight'\]"):
        bl.hypergradient(
            problem,
            x,
            None,
            batches,
            solver=bl.Descent(bl.SGD(0.1), 0),
            estimator=bl.TaskMean(bl.Unrolled(), weights=bl.GradientSimilarity(over="net.2")),
        )


@pytest.mark.parametrize(
    "weights", [bl.GradientSimilarity(), bl.GradientSimilarity(None), bl.GradientSimilarity(0.1, True)]
)
def test_gradients_that_have_no_direction_and_tasks_that_are_alone(weights):
    zeros = signed([[0.0, 0.0]] * 3, weights)
    torch.testing.assert_close(zeros.stats["task_weights"], torch.full((3,), 1 / 3, dtype=D))
    torch.testing.assert_close(zeros.grad, torch.zeros(2, dtype=D))
    opposed = signed([[1.0, 0.0], [-1.0, 0.0]], weights)
    torch.testing.assert_close(opposed.stats["task_weights"], torch.full((2,), 0.5, dtype=D))
    alone = signed([[3.0, 4.0]], weights)
    torch.testing.assert_close(alone.stats["task_weights"], torch.ones(1, dtype=D))
    torch.testing.assert_close(alone.grad, torch.tensor([3.0, 4.0], dtype=D))
    one_zero = signed([[1.0, 0.0], [0.0, 0.0]], weights)
    assert bool(one_zero.stats["task_weights"].isfinite().all())
    assert float(one_zero.stats["task_weights"].sum()) == pytest.approx(1.0)
    weights_found = one_zero.stats["task_weights"].tolist()
    assert weights_found[0] >= weights_found[1]


@pytest.mark.parametrize("size", [1e-40, 1e-25, 1e25, 1e37])
@pytest.mark.parametrize("pairwise", [False, True])
def test_very_small_and_very_large_float32_gradients(size, pairwise):
    """Their squares overflow or vanish; the cosines do not."""
    slopes = size * torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [-1.0, -2.0]])
    problem = bl.Problem(lambda y, x, b: (y**2).sum(), lambda y, x, b: (b * y).sum(), init=lambda x, b: x)
    found = bl.hypergradient(
        problem,
        torch.zeros(2),
        None,
        bl.Batches(inner=slopes, outer=slopes),
        solver=bl.Descent(bl.SGD(0.1), 0),
        estimator=bl.TaskMean(bl.Unrolled(), weights=bl.GradientSimilarity(pairwise=pairwise)),
    )
    s = torch.tensor([1 / 3, 1 / 3, 1 / 3, -1.0] if pairwise else [1.0, 1.0, 1.0, -1.0], dtype=D)
    torch.testing.assert_close(found.stats["task_weights"], torch.softmax(s, 0), rtol=1e-3, atol=0)
    assert found.grad.dtype is torch.float32


def test_an_outer_tensor_that_one_task_does_not_use_and_one_that_none_does():
    problem = bl.Problem(
        lambda y, x, b: ((y - x["a"]) ** 2).sum(), lambda y, x, b: (y * b).sum() + 0 * x["b"].sum(), init=None
    )
    x = {"a": torch.zeros(2, dtype=D), "b": torch.zeros(1, dtype=D)}
    slopes = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=D)
    found = bl.hypergradient(
        problem,
        x,
        torch.zeros(2, 2, dtype=D),
        bl.Batches(inner=slopes, outer=slopes),
        solver=bl.Descent(bl.SGD(0.5), 1),
        estimator=bl.TaskMean(bl.Unrolled(), weights=bl.GradientSimilarity()),
    )
    expected = torch.softmax(cosines_of(slopes), 0)
    torch.testing.assert_close(found.grad["a"], expected @ slopes)
    torch.testing.assert_close(found.grad["b"], torch.zeros(1, dtype=D))


def test_weights_are_constants():
    """dF/dx is sum_i w_i g_i, not the derivative of sum_i w_i(x) f_i: f's second derivative is not in it."""
    problem = bl.Problem(lambda y, x, b: y**2, lambda y, x, b: b * y**3 / 3, init=lambda x, b: x)
    slopes, x = torch.tensor([1.0, 2.0, -1.0], dtype=D), torch.tensor(2.0, dtype=D)
    found = bl.hypergradient(
        problem,
        x,
        None,
        bl.Batches(inner=slopes, outer=slopes),
        solver=bl.Descent(bl.SGD(0.1), 0),
        estimator=bl.TaskMean(bl.Unrolled(), weights=bl.GradientSimilarity()),
    )
    weights = torch.softmax(torch.tensor([1.0, 1.0, -1.0], dtype=D), 0)
    torch.testing.assert_close(found.grad, (weights * slopes).sum() * 4)
    assert not found.stats["task_weights"].requires_grad


def test_a_task_that_diverges_fails_the_whole():
    for weights in (bl.GradientSimilarity(), bl.GradientSimilarity(None), bl.GradientSimilarity(pairwise=True)):
        found = signed([[1.0, 0.0], [math.nan, 0.0]], weights)
        assert found.status.failed
        assert not bool(found.grad.isfinite().all())


# --- what is refused


@dataclasses.dataclass(frozen=True)
class Returns(bl.TaskWeights):
    value: object

    def weigh(self, tasks):
        return self.value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "returned a NoneType"),
        ([0.5, 0.5], "returned a list"),
        (torch.tensor(0.5), r"shape \(\)"),
        (torch.full((3,), 1 / 3), r"shape \(3,\)"),
        (torch.full((2, 1), 0.5), r"shape \(2, 1\)"),
        (torch.tensor([1, 0]), "int64"),
        (torch.tensor([1.5, -0.5]), "at least 0 with the sum 1"),
        (torch.tensor([1.0, 1.0]), "at least 0 with the sum 1"),
        (torch.tensor([0.0, 0.0]), "at least 0 with the sum 1"),
    ],
)
def test_weights_of_a_users_own_are_right_or_refused(value, message):
    with pytest.raises(ValueError, match=message):
        signed([[1.0], [2.0]], Returns(value))


def test_what_a_users_weights_are_given():
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Look(bl.TaskWeights):
        def weigh(self, tasks):
            seen.append(tasks)
            return torch.tensor([0.25, 0.75], requires_grad=True)

    found = signed([[1.0, 3.0], [2.0, 5.0]], Look(), ids=["p", "q"])
    torch.testing.assert_close(found.grad, torch.tensor([1.75, 4.5], dtype=D))
    assert not found.grad.requires_grad
    (tasks,) = seen
    assert isinstance(tasks, TaskResults)
    assert len(tasks) == 2
    assert tasks.names == ("",)
    assert tasks.task_ids == ("p", "q")
    assert tasks.outer_loss.shape == tasks.inner_loss.shape == (2,)
    torch.testing.assert_close(tasks.gradients[1][0], torch.tensor([2.0, 5.0], dtype=D))
    nan = signed([[1.0], [2.0]], Returns(torch.tensor([math.nan, 1.0])))
    assert nan.status is bl.Status.NONFINITE


def test_what_is_refused():
    for bad in (0, 0.0, -1.0, math.nan, True, "1"):
        with pytest.raises(ValueError, match="temperature="):
            bl.GradientSimilarity(bad)
    for bad in ([], [0.0, 0.0], [-1.0, 2.0], [math.inf, 1.0], [math.nan], {}, {"a": -1.0}, torch.tensor([0.0])):
        with pytest.raises(ValueError, match="GivenWeights was given"):
            bl.GivenWeights(bad)
    with pytest.raises(TypeError, match=r"GivenWeights\(\[...\]\)"):
        bl.TaskMean(bl.Unrolled(), weights=torch.ones(2))
    with pytest.raises(TypeError, match="task weights such as GradientSimilarity"):
        bl.TaskMean(bl.Unrolled(), weights=bl.GradientSimilarity)
    with pytest.raises(ValueError, match="one by one"):
        bl.TaskMean(bl.Unrolled(), 2, bl.GradientSimilarity())
    with pytest.raises(ValueError, match="3 weights, and there are 2 tasks"):
        signed([[1.0], [2.0]], bl.GivenWeights([1, 1, 1]))
    with pytest.raises(ValueError, match="no task_ids"):
        signed([[1.0], [2.0]], bl.GivenWeights({"a": 1.0}))
    with pytest.raises(ValueError, match=r"the tasks \['b'\]"):
        signed([[1.0], [2.0]], bl.GivenWeights({"a": 1.0}), ids=["a", "b"])
    with pytest.raises(ValueError, match="weight 0 for every task"):
        signed([[1.0], [2.0]], bl.GivenWeights({"a": 0.0, "b": 0.0, "c": 1.0}), ids=["a", "b"])
    with pytest.raises(TypeError, match="final"):

        class Further(bl.GradientSimilarity):
            pass


def test_weights_through_the_learner():
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 2).double()
    x, y = torch.randn(3, 6, 3, dtype=D), torch.randint(0, 2, (3, 6))
    batches = bl.Batches(inner=(x[:, :3], y[:, :3]), outer=(x[:, 3:], y[:, 3:]))
    loss = torch.nn.functional.cross_entropy
    learner = bl.meta.Learner(module, loss, weights=bl.GradientSimilarity(over="parameters.bias"))
    found = learner.hypergradient(learner.outer(), batches)
    alone = []
    for i in range(3):
        task = bl.Batches(
            tuple(leaf[i : i + 1] for leaf in batches.inner), tuple(leaf[i : i + 1] for leaf in batches.outer)
        )
        alone.append(bl.meta.Learner(module, loss).hypergradient(learner.outer(), task).grad["parameters"])
    weights = torch.softmax(cosines_of(torch.stack([grad["bias"] for grad in alone])), 0)
    torch.testing.assert_close(found.stats["task_weights"], weights, rtol=1e-10, atol=0)
    expected = sum(w * grad["weight"] for w, grad in zip(weights, alone, strict=True))
    torch.testing.assert_close(found.grad["parameters"]["weight"], expected, rtol=1e-9, atol=1e-12)


def test_one_large_gradient_draws_the_mean_to_itself_but_not_the_pairs():
    """Documented: which of the two similarities sees an outlier of any size."""
    slopes = [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [-100.0, 0.0]]
    assert signed(slopes, bl.GradientSimilarity()).stats["task_weights"].argmax() == 3
    assert signed(slopes, bl.GradientSimilarity(pairwise=True)).stats["task_weights"].argmin() == 3
