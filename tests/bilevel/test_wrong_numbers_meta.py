"""Learners on modules, copies and arguments that a stranger brings: right, or refused in words."""

import copy
import dataclasses
import pickle

import pytest
import torch
from right_or_refused import D, close
from torch import nn
from torch.func import functional_call

import bilevel as bl
from bilevel.data import ClassSet
from bilevel.data.imageset import ImageSet

CE = nn.functional.cross_entropy
TASKS, STEPS, RATE = 3, 3, 0.1


def inputs_of(seed, shape=(5, 4)):
    return torch.randn(TASKS, *shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def labels_of(seed, examples=5):
    return torch.randint(3, (TASKS, examples), generator=torch.Generator().manual_seed(seed))


BATCHES = bl.Batches(inner=(inputs_of(0), labels_of(1)), outer=(inputs_of(2), labels_of(3)))
FIRST = BATCHES.inner[0][0], BATCHES.inner[1][0]


def net_of():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(D)


def learner_of(net, adapts=True, **keywords):
    return bl.Learner(net, CE, adapts=adapts, solver=bl.Descent(bl.SGD(RATE), STEPS), **keywords)


def by_hand(net, adapts, batches):
    """MAML by loops and torch.func.functional_call: gradients by name, and the mean outer loss."""
    x = {name: parameter.detach().clone().requires_grad_() for name, parameter in net.named_parameters()}
    total = torch.zeros((), dtype=D)
    for task in range(TASKS):
        y = {name: x[name] for name in x if name.startswith(adapts)}

        def loss(y, part, task=task):
            return CE(functional_call(net, {**x, **y}, (part[0][task],)), part[1][task])

        for _ in range(STEPS):
            gradients = torch.autograd.grad(loss(y, batches.inner), list(y.values()), create_graph=True)
            y = {name: leaf - RATE * g for (name, leaf), g in zip(y.items(), gradients, strict=True)}
        total = total + loss(y, batches.outer) / TASKS
    return dict(zip(x, torch.autograd.grad(total, list(x.values())), strict=True)), total.detach()


def held(net, adapts, batches, **keywords):
    learner = learner_of(net, adapts or True, **keywords)
    hg = learner.hypergradient(learner.outer(), batches)
    expected, loss = by_hand(net, adapts, batches)
    assert not hg.status.failed
    close(hg.outer_loss, loss, 1e-12)
    for name, gradient in expected.items():
        close(hg.grad["parameters"][name], gradient, 1e-12)


@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("padding", [0, -1])
@pytest.mark.parametrize("adapts", ["", "0", "2"])
def test_the_padding_of_an_embedding_gets_no_gradient_in_any_chunk(chunk, padding, adapts):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(6, 4, padding_idx=padding), nn.Flatten(), nn.Linear(12, 3)).to(D)
    tokens = torch.randint(6, (2, TASKS, 5, 3), generator=torch.Generator().manual_seed(5))
    assert (tokens == padding % 6).any()
    held(net, adapts, bl.Batches(inner=(tokens[0], labels_of(1)), outer=(tokens[1], labels_of(3))), chunk=chunk)


@pytest.mark.parametrize("chunk", [None, 1])
def test_the_padding_of_an_embedding_in_a_loss_gets_no_gradient(chunk):
    tokens, table = torch.tensor([[0, 1, 1], [2, 0, 2]]), torch.ones(3, 2, dtype=D)

    def loss(y, x, b):
        return nn.functional.embedding(b, y, padding_idx=0).square().sum()

    hg = bl.hypergradient(
        bl.Problem(loss, loss, init=lambda x, b: x),
        table,
        None,
        bl.Batches(tokens, tokens),
        solver=bl.Descent(bl.SGD(0.1), 1),
        estimator=bl.TaskMean(bl.Unrolled(), chunk=chunk),
    )
    # A row that is met twice is multiplied by 1 - 4 * 0.1 and has the outer gradient 4 y: 4 * 0.6^2, of half the tasks.
    close(hg.grad, torch.tensor([[0.0, 0.0], [0.72, 0.72], [0.72, 0.72]], dtype=D), 1e-12)


@pytest.mark.parametrize("chunk", [None, 1])
def test_a_sparse_embedding_adapts_in_any_chunk(chunk):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(6, 4, sparse=True), nn.Flatten(), nn.Linear(12, 3)).to(D)
    dense = copy.deepcopy(net)
    dense[0].sparse = False
    tokens = torch.randint(6, (TASKS, 5, 3), generator=torch.Generator().manual_seed(5))
    batches = bl.Batches(inner=(tokens, labels_of(1)), outer=(tokens, labels_of(3)))
    learner = learner_of(net, chunk=chunk)
    expected, _ = by_hand(dense, "", batches)
    close(learner.hypergradient(learner.outer(), batches).grad["parameters"]["0.weight"], expected["0.weight"], 1e-12)


@pytest.mark.parametrize("option", [{"max_norm": 0.5}, {"scale_grad_by_freq": True}])
@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_that_write_or_whose_gradient_is_no_derivative_are_refused(layer, option):
    with pytest.raises(ValueError, match=next(iter(option))):
        bl.functional(layer(6, 4, **option))


def test_counts_of_an_embedding_are_not_taken_over_all_tasks():
    def loss(y, x, b):
        return nn.functional.embedding(b, y, scale_grad_by_freq=True).square().sum()

    tokens = torch.tensor([[0, 1], [1, 1]])
    with pytest.raises(ValueError, match=r"scale_grad_by_freq.*chunk=1"):
        bl.hypergradient(
            bl.Problem(loss, loss, init=lambda x, b: x),
            torch.ones(2, 1, dtype=D),
            None,
            bl.Batches(tokens, tokens),
            solver=bl.Descent(bl.SGD(0.1), 1),
            estimator=bl.TaskMean(bl.FirstOrder()),
        )


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_run_or_are_refused(register):
    net = net_of()
    getattr(net[1], register)(lambda module, *gradients: (3 * gradients[0][0],))
    learner = learner_of(net)
    with pytest.raises(ValueError, match=r"backward hooks.*chunk=1"):
        learner.hypergradient(learner.outer(), BATCHES)


@pytest.mark.parametrize("chunk", [None, 1])
def test_a_sequential_with_a_forward_of_its_own_is_called_as_a_whole(chunk):
    net = net_of()
    net.forward = lambda inputs: 2 * nn.Sequential.forward(net, inputs)
    held(net, "2", BATCHES, chunk=chunk)


def replaced(net):
    net[1] = nn.ReLU()


@pytest.mark.parametrize(
    "change",
    [
        replaced,
        lambda net: net.append(nn.Tanh()),
        lambda net: net.register_forward_hook(lambda module, given, value: 2 * value),
        lambda net: net.register_forward_pre_hook(lambda module, given: (2 * given[0],)),
    ],
)
def test_a_module_that_changed_after_the_learner_was_made_is_not_run_as_it_was(change):
    net = net_of()
    learner = learner_of(net, "2")
    x = learner.outer()
    learner.hypergradient(x, BATCHES)
    change(net)
    with pytest.raises(ValueError, match="changed after the Learner was made"):
        learner.hypergradient(x, BATCHES)
    with pytest.raises(ValueError, match="changed after the Learner was made"):
        learner.adapt(x, FIRST)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda learner: pickle.loads(pickle.dumps(learner))])
def test_a_copy_of_a_learner_runs_its_own_module(copied):
    net = net_of()
    net[0].requires_grad_(False)
    learner = learner_of(net, "2")
    x = learner.outer()
    before = learner.hypergradient(x, BATCHES).outer_loss
    other = copied(learner)
    with torch.no_grad():
        net[0].weight.zero_()
    close(other.hypergradient(x, BATCHES).outer_loss, before, 1e-15)
    assert other.solver == learner.solver
    assert abs(learner.hypergradient(x, BATCHES).outer_loss - before) > 1e-3


@pytest.mark.parametrize("tasks", [-1, 0, 1])
def test_a_number_of_test_tasks_is_at_least_two(tasks):
    learner = learner_of(net_of())
    for run in (learner.evaluate, lambda *given, **options: bl.meta.reuse(learner, *given, **options)):
        with pytest.raises(ValueError, match=f"tasks={tasks}"):
            run(learner.outer(), [BATCHES], tasks=tasks)


def test_an_evaluation_that_failed_prints_so():
    learner = learner_of(net_of())
    support = torch.full_like(BATCHES.inner[0], float("nan")), BATCHES.inner[1]
    found = learner.evaluate(learner.outer(), [bl.Batches(inner=support, outer=BATCHES.outer)])
    assert found.status.failed
    assert found.status.name in str(found)


def test_a_score_is_one_number():
    learner = learner_of(net_of())
    with pytest.raises(ValueError, match=r"shape \(5,\); one number"):
        learner.evaluate(learner.outer(), [BATCHES], score=lambda prediction, target: prediction.argmax(1) == target)


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("adapts", ["2", "4"])
def test_a_layer_that_stands_twice_shares_features_or_does_not(chunk, adapts):
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    net = nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 4), layer, nn.Linear(4, 3)).to(D)
    found = []
    for reuse in (True, False):
        learner = learner_of(net, adapts, chunk=chunk, reuse_features=reuse)
        found.append(learner.hypergradient(learner.outer(), BATCHES).grad["parameters"])
    assert sorted(found[0]) == ["0.bias", "0.weight", "2.bias", "2.weight", "4.bias", "4.weight"]
    for name in found[0]:
        close(found[0][name], found[1][name], 1e-14)


def test_parameters_that_are_gone_are_named():
    net = net_of()
    learner = learner_of(net, "2")
    x = learner.outer()
    nn.utils.parametrizations.orthogonal(net[0])
    with pytest.raises(ValueError, match=r"no parameters \['0.weight'\] any more"):
        learner.hypergradient(x, BATCHES)


@dataclasses.dataclass(frozen=True)
class Numbers(bl.meta.Start):
    learned, pull = False, 0.0

    def begin(self, own, outer, batch):
        return dict.fromkeys(own, 0.0)


@dataclasses.dataclass(frozen=True)
class InPlace(bl.meta.Start):
    learned, pull = False, 0.0

    def begin(self, own, outer, batch):
        return {name: value.mul_(2) for name, value in own.items()}


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize(("start", "word"), [(Numbers(), "names and shapes"), (InPlace(), "in place")])
def test_a_start_of_ones_own_that_gives_numbers_or_works_in_place_is_refused(start, word, chunk):
    learner = learner_of(net_of(), "2", start=start, chunk=chunk)
    with pytest.raises(ValueError, match=word):
        learner.hypergradient(learner.outer(), BATCHES)


@dataclasses.dataclass(frozen=True)
class Pushed(bl.meta.Start):
    learned, pull = True, -1.0

    def begin(self, own, outer, batch):
        return own


def test_a_negative_pull_of_a_start_of_ones_own_is_refused():
    with pytest.raises(ValueError, match=r"Pushed.*pull=-1"):
        learner_of(net_of(), start=Pushed())


@pytest.mark.parametrize(
    ("broken", "word"),
    [
        (lambda x: x["parameters"], "missing"),
        (lambda x: {}, "missing"),
        (lambda x: {**x, "rates": {}}, "rates"),
        (lambda x: {**x, "parameters": {**x["parameters"], "2.bias": torch.zeros(1, dtype=D)}}, "2.bias"),
    ],
)
def test_an_x_of_another_learner_is_refused_in_words(broken, word):
    learner = learner_of(net_of(), rates=bl.meta.Rates())
    x = broken(learner.outer())
    for run in (
        lambda: learner.hypergradient(x, BATCHES),
        lambda: next(iter(learner.train(x, [BATCHES]))),
        lambda: learner.adapt(x, FIRST),
        lambda: learner.predict(x, FIRST, FIRST[0]),
        lambda: learner.evaluate(x, [BATCHES]),
    ):
        with pytest.raises(ValueError, match=word):
            run()


@pytest.mark.parametrize("inner", [BATCHES.inner[0], (*BATCHES.inner, BATCHES.inner[1])])
def test_a_batch_that_is_no_pair_is_refused_in_words(inner):
    learner = learner_of(net_of())
    with pytest.raises(ValueError, match="a pair was needed"):
        learner.hypergradient(learner.outer(), bl.Batches(inner=inner, outer=BATCHES.outer))


def test_rows_that_are_a_tensor_take_those_rows():
    data = ClassSet.of(torch.arange(8.0).reshape(4, 2), [0, 0, 1, 1])
    assert data.take(torch.tensor([0, 1])).tolist() == [[0, 1], [2, 3]]
    images = ImageSet(torch.arange(8, dtype=torch.uint8).reshape(2, 1, 2, 2), (1, 1), ("a", "b"))
    assert images.take(torch.tensor([0, 1])).shape == (2, 1, 2, 2)


def test_rates_of_each_step_have_no_more_steps():
    learner = learner_of(net_of(), rates=bl.meta.Rates(per_step=True))
    with pytest.raises(ValueError, match="rates of 3 steps"):
        learner.adapt(learner.outer(), FIRST, solver=bl.Descent(bl.SGD(RATE), STEPS + 1))


def test_a_frozen_parameter_adapts_where_it_is_named():
    net = net_of()
    net[2].requires_grad_(False)
    assert sorted(learner_of(net, "2.bias").outer()["parameters"]) == ["0.bias", "0.weight", "2.bias"]


def test_a_layer_that_works_in_place_on_shared_features_is_named():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, 3))).to(D)
    learner = learner_of(net, "1")
    with pytest.raises(ValueError, match="reuse_features=False"):
        learner.hypergradient(learner.outer(), BATCHES)
    held(net, "1", BATCHES, reuse_features=False)


class Reversed(nn.Module):
    def forward(self, x):
        x = 1 * x
        x.register_hook(lambda gradient: -gradient)
        return x


def test_a_hook_on_a_tensor_needs_tasks_one_by_one():
    net = net_of()
    net.insert(2, Reversed())
    learner = learner_of(net)
    with pytest.raises(ValueError, match="chunk=1"):
        learner.hypergradient(learner.outer(), BATCHES)


def test_tasks_without_targets_are_evaluated():
    learner = bl.Learner(net_of(), lambda prediction, target: prediction.square().mean())
    x = learner.outer()
    batches = bl.Batches(inner=(BATCHES.inner[0], None), outer=(BATCHES.outer[0], None))
    found = learner.evaluate(x, [batches], score=lambda prediction, target: prediction.square().mean())
    assert found.tasks == TASKS
    assert found.score == pytest.approx(found.loss, abs=1e-14)
    predicted = [
        learner.predict(x, (one, None), query) for one, query in zip(batches.inner[0], BATCHES.outer[0], strict=True)
    ]
    assert found.scores == pytest.approx([one.square().mean().item() for one in predicted], abs=1e-14)
