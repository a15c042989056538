"""The transformer and the reweighting of its training text: derivatives, causality, data, learning, and a billion
parameters without memory."""

import inspect
import json
import math
import os
import subprocess
import sys

import pytest
import torch

import bilevel as bl
from bilevel.problems import language
from bilevel.problems.transformer import Transformer, transformer
from bilevel.space import tree

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, NO_CUDA])]
TINY = {"layers": 1, "width": 8, "heads": 2, "context": 6}


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(tree.tensors(a), tree.tensors(b), strict=True))


# --- transformer


def test_parameters_are_those_of_the_formula_and_depend_on_the_seed_only():
    _, params = transformer(vocabulary=10, context=7, layers=3, width=12, heads=3)
    blocks = 3 * (12 * 12**2 + (4 + 4 + 1) * 12 + 4 * 12)
    assert sum(leaf.numel() for leaf in params.values()) == blocks + (2 * 10 + 7) * 12 + 2 * 12
    state = torch.get_rng_state()
    again, other = (transformer(vocabulary=10, context=7, layers=3, width=12, heads=3, seed=seed)[1] for seed in (0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert same(params, again)
    assert not same(params, other)
    half = transformer(vocabulary=10, context=7, layers=3, width=12, heads=3, dtype=torch.bfloat16)[1]
    assert same(half, {name: leaf.bfloat16() for name, leaf in params.items()})


def test_a_prediction_depends_on_no_later_byte():
    call, params = transformer(vocabulary=11, context=9, layers=2, width=16, heads=4, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(11, (1, 9), generator=generator)
    embedded = params["tokens.weight"][tokens]

    def scores(embedded):
        # every place of the sequence as a row of the vocabulary, so that each has an embedding of its own to
        # differentiate
        return call({**params, "tokens.weight": embedded[0]}, torch.arange(9)[None])[0]

    influence = (
        torch.autograd.functional.jacobian(scores, embedded)[:, :, 0].abs().sum((1, 3))
    )  # [place of the score, place of the input]
    assert torch.equal(influence > 0, torch.ones(9, 9).tril() > 0)
    shorter = call(params, tokens[:, :4])
    torch.testing.assert_close(shorter, call(params, tokens)[:, :4])


def test_attention_is_that_of_torch():
    module = Transformer(vocabulary=5, context=6, layers=1, width=8, heads=2).double()
    attention, hidden = module.blocks[0].attention, torch.randn(3, 6, 8, dtype=torch.float64)
    query, key, value = (
        part(hidden).view(3, 6, 2, 4).transpose(1, 2) for part in (attention.query, attention.key, attention.value)
    )
    fused = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    mask = torch.full((6, 6), -math.inf, dtype=torch.float64).triu(1)
    torch.testing.assert_close(attention(hidden, mask), attention.mix(fused.transpose(1, 2).reshape(3, 6, 8)))


@pytest.mark.parametrize("device", DEVICES)
def test_first_and_second_derivatives_agree_with_finite_differences(device):
    call, params = transformer(vocabulary=5, context=4, layers=1, width=4, heads=2, dtype=torch.float64, device=device)
    tokens = torch.tensor([[0, 3, 1, 4], [2, 2, 0, 1]], device=device)
    leaves = [leaf.requires_grad_() for leaf in params.values()]

    def loss(*leaves):
        return call(dict(zip(params, leaves, strict=True)), tokens).square().mean()

    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, leaves, fast_mode=True)


# torch's own forward-mode rule of layer normalization says so when it is first used.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("device", DEVICES)
def test_vmap_over_parameters_and_forward_over_reverse(device):
    made = [
        transformer(vocabulary=5, context=4, layers=1, width=8, heads=2, seed=seed, device=device) for seed in (0, 1)
    ]
    call, params = made[0]
    stacked = {name: torch.stack([parts[name] for _, parts in made]) for name in params}
    tokens = torch.randint(5, (2, 3, 4), generator=torch.Generator().manual_seed(0)).to(device)
    mapped = torch.func.vmap(call)(stacked, tokens)
    torch.testing.assert_close(
        mapped, torch.stack([call(parts, row) for (_, parts), row in zip(made, tokens, strict=True)])
    )

    def gradient(params):
        return torch.func.grad(lambda params: call(params, tokens[0]).square().mean())(params)

    _, product = torch.func.jvp(gradient, (params,), (made[1][1],))
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in params.items()}
    first = torch.autograd.grad(call(leaves, tokens[0]).square().mean(), leaves.values(), create_graph=True)
    double = torch.autograd.grad(first, leaves.values(), list(made[1][1].values()))
    torch.testing.assert_close(list(product.values()), list(double), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "says"), [({"width": 10, "heads": 4}, "a width that the heads divide"), ({"layers": 0}, "layers=0")]
)
def test_the_transformer_refuses_sizes_that_do_not_fit(sizes, says):
    with pytest.raises(ValueError, match=says):
        transformer(**sizes)


# --- data


def test_text_is_cut_and_corrupted_as_promised():
    text = language.source()
    assert len(text) > 10**6
    data = language.load(seed=3, corruption=0.25, context=20, examples=40, validation=30, test=20)
    assert [tuple(part.shape) for part in (data.train, data.valid, data.test)] == [(40, 21), (30, 21), (20, 21)]
    found = torch.tensor([bytes(row.tolist()) in text for row in data.train])
    assert int(data.corrupted.sum()) == 10
    assert torch.equal(found, ~data.corrupted)
    kept = text[len(text) * 4 // 5 :]
    assert all(bytes(row.tolist()) in kept for row in torch.cat([data.valid, data.test]))
    # what is corrupted is known to one who knows the seed, the share and how many
    assert torch.equal(
        data.corrupted, language.load(seed=3, corruption=0.25, context=7, examples=40, validation=1).corrupted
    )
    assert same(data.train, language.load(seed=3, corruption=0.25, context=20, examples=40, validation=1).train)
    assert not same(data.train, language.load(seed=4, corruption=0.25, context=20, examples=40).train)


def test_text_of_ones_own_and_a_missing_library(tmp_path):
    data = language.load(context=4, examples=3, validation=2, corruption=0.0, text=b"abcde" * 20)
    assert set(data.train.flatten().tolist()) <= set(b"abcde")
    with pytest.raises(FileNotFoundError, match=r"argparse\.py could not be read.*load\(text="):
        language.source(tmp_path)
    with pytest.raises(ValueError, match="its last fifth must hold 9"):
        language.load(context=8, text=b"abcde" * 4)
    with pytest.raises(TypeError, match=r"type str was given.*text\.encode"):
        language.load(context=4, text="abcde" * 20)
    for wrong in ({"corruption": -0.1}, {"corruption": math.nan}, {"examples": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            language.load(**wrong)


# --- problem


def test_setup_starts_with_device_and_seed_and_is_the_same_each_time():
    assert list(inspect.signature(language.setup).parameters)[:2] == ["device", "seed"]
    first, again, other = (language.setup(seed=seed, **TINY) for seed in (1, 1, 2))
    for place in (1, 2):
        assert same(first[place], again[place])
    assert same(first[3].inner, again[3].inner)
    assert not same(first[3].inner, other[3].inner)
    assert not same(first[2], other[2])


def test_losses_are_what_the_formula_says():
    problem, _, inner, batches = language.setup(**TINY, examples=10, l2=0.1, dtype=torch.float64)
    call, _ = transformer(**TINY)
    sequences, index = batches.inner
    outer = {"logits": torch.linspace(-2, 2, 10, dtype=torch.float64)}
    told = torch.log_softmax(call(inner, sequences[:, :-1]), -1).gather(2, sequences[:, 1:, None])[:, :, 0]
    weights = outer["logits"].sigmoid()
    expected = (weights * -told.mean(1)).sum() / weights.sum() + 0.05 * sum(
        leaf.square().sum() for leaf in inner.values()
    )
    torch.testing.assert_close(problem.inner(inner, outer, batches.inner), expected)
    rows = torch.tensor([7, 2])
    part = problem.inner(inner, outer, (sequences[rows], index[rows]))
    penalty = expected - (weights * -told.mean(1)).sum() / weights.sum()
    torch.testing.assert_close(part, (weights[rows] * -told.mean(1)[rows]).sum() / weights[rows].sum() + penalty)


def test_batch_scales_what_an_inner_step_sees():
    _, outer, _, batches = language.setup(**TINY, examples=10, batch=4, steps=5)
    assert [len(index) for _, index in batches.inner] == [4] * 5
    everyone = torch.cat([index for _, index in batches.inner])
    assert torch.equal(everyone[:10].sort().values, torch.arange(10))
    assert torch.equal(everyone[10:].sort().values, torch.arange(10))
    whole = language.setup(**TINY, examples=10)[3].inner
    assert all(torch.equal(sequences, whole[0][index]) for sequences, index in batches.inner)
    assert [tuple(part.shape) for part in language.setup(**TINY, examples=10, batch=25, steps=1)[3].inner[0]] == [
        (25, 7),
        (25,),
    ]
    assert outer["logits"].shape == (10,)
    with pytest.raises(ValueError, match="batch=0"):
        language.setup(batch=0)
    with pytest.raises(ValueError, match="steps=0"):
        language.setup(**TINY, batch=2, steps=0)


@pytest.mark.parametrize("device", DEVICES)
def test_hypergradients_agree_with_finite_differences(device):
    problem, _, inner, batches = language.setup(device, **TINY, examples=5, dtype=torch.float64)
    solver = bl.Descent(bl.SGD(lr=0.5), steps=3)

    def value(logits):
        return bl.hypergradient(problem, {"logits": logits}, inner, batches, solver=solver, estimator=bl.Unrolled())

    start = torch.linspace(-1, 1, 5, dtype=torch.float64, device=device)
    found = value(start).grad["logits"]
    steps = 1e-4 * torch.eye(5, dtype=torch.float64, device=device)
    differences = torch.stack(
        [(value(start + step).outer_loss - value(start - step).outer_loss) / 2e-4 for step in steps]
    )
    torch.testing.assert_close(found, differences, rtol=1e-5, atol=1e-10)


def test_tasks_and_bfloat16():
    _, _, inner, batches = language.setup(**TINY, examples=4, validation=4)
    call, _ = transformer(**TINY)

    def loss(inner, outer, sequences):
        return torch.nn.functional.cross_entropy(
            call(inner, sequences[:, :-1]).flatten(0, 1), sequences[:, 1:].flatten()
        )

    maml = bl.Problem(loss, loss, init=lambda outer, batch: outer)
    sequences, _ = batches.inner
    tasks = bl.Batches(inner=sequences.unflatten(0, (2, 2)), outer=batches.outer.unflatten(0, (2, 2)))
    solver = bl.Descent(bl.SGD(lr=0.1), steps=2)
    at_once, in_turn = (
        bl.hypergradient(
            maml, inner, None, tasks, solver=solver, estimator=bl.TaskMean(bl.Unrolled(), chunk=chunk)
        ).grad
        for chunk in (2, 1)
    )
    torch.testing.assert_close(at_once, in_turn)
    problem, outer, inner, batches = language.setup(**TINY, dtype=torch.bfloat16)
    hg = bl.hypergradient(problem, outer, inner, batches, solver=solver, estimator=bl.Unrolled())
    assert hg.grad["logits"].dtype == torch.bfloat16
    assert hg.grad["logits"].isfinite().all()


# --- learning


def test_learned_weights_find_the_corrupted_sequences():
    sizes = {"layers": 2, "width": 32, "heads": 4, "context": 16}
    problem, outer, inner, batches = language.setup(seed=1, **sizes, examples=32, validation=32)
    optimizer = torch.optim.Adam(outer.values(), lr=language.OUTER_LR)
    solver = bl.Descent(bl.SGD(lr=language.INNER_LR), steps=4)
    steps = list(
        bl.iterate(problem, outer, inner, [batches] * 8, solver=solver, estimator=bl.Unrolled(), optimizer=optimizer)
    )
    assert steps[-1].outer_loss < steps[0].outer_loss - 0.5
    found = language.evaluate(outer, seed=1, **sizes, steps=25)
    assert found["corruption_auc"] > 0.9
    assert found["test_loss"] < found["baseline_test_loss"]


def test_evaluate_separates_perfect_from_useless_weights():
    data = language.load(context=16, examples=32, validation=1)
    sizes = {"layers": 1, "width": 16, "heads": 2, "steps": 40, "lr": 1e-2}
    perfect = language.evaluate({"logits": torch.where(data.corrupted, -20.0, 20.0)}, data, **sizes)
    assert perfect["corruption_auc"] == 1.0
    assert perfect["test_loss"] == pytest.approx(perfect["ideal_test_loss"], abs=1e-3)
    assert perfect["test_loss"] < perfect["baseline_test_loss"] - 0.05
    useless = language.evaluate({"logits": torch.zeros(32)}, data, **sizes)
    assert useless["corruption_auc"] == 0.5
    assert useless["test_loss"] == pytest.approx(useless["baseline_test_loss"])
    logits = torch.randn(32, generator=torch.Generator().manual_seed(0)).round(decimals=0)
    wrong, clean = logits[data.corrupted][:, None], logits[~data.corrupted][None]
    pairs = ((wrong < clean).double() + 0.5 * (wrong == clean).double()).mean().item()
    assert language.evaluate({"logits": logits}, data, steps=0) == {"corruption_auc": pytest.approx(pairs)}
    assert math.isnan(language.evaluate({"logits": logits}, corruption=0.0, steps=0)["corruption_auc"])
    for steps in (0, 1):
        with pytest.raises(ValueError, match="one for each of the 32"):
            language.evaluate({"logits": torch.zeros(3)}, data, steps=steps)


# --- size

_BILLION = """
import json, time
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
import bilevel as bl
from bilevel.problems import language

def resident(what):  # not ru_maxrss, which begins at that of the process that started this one
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(what))

def spent(width):
    started = time.process_time()
    with FakeTensorMode(allow_non_fake_inputs=True):
        problem, outer, inner, batches = language.setup(width=width, layers=2, heads=16, context=512)
        assert all(isinstance(leaf, FakeTensor) for leaf in inner.values())
        solver = bl.Descent(bl.SGD(lr=0.1), steps=1)
        hg = bl.hypergradient(problem, outer, inner, batches, solver=solver, estimator=bl.Unrolled())
        assert isinstance(hg.grad["logits"], FakeTensor)
    return sum(leaf.numel() for leaf in inner.values()), time.process_time() - started

torch.zeros(1)
before = resident("VmRSS")
_, little = spent(16)
size, much = spent(6656)
print(json.dumps({"size": size, "ratio": much / little, "bytes": resident("VmHWM") - before}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_billion_parameters_take_neither_memory_nor_time_under_fake_tensors():
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, "-c", _BILLION], capture_output=True, text=True, env=environment)
    assert out.returncode == 0, out.stderr
    found = json.loads(out.stdout)
    assert found["size"] > 10**9
    assert found["ratio"] < 5  # in CPU seconds, against a width of 16, which is first and pays for what is loaded
    assert found["bytes"] < 500 * 2**20  # one of its larger matrices has 709 MB
