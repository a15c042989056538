"""The ready problems: data against what they promise, closed forms against autograd, and that learning on them pays."""

import inspect
import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import bilevel as bl
from bilevel.data import _cache, glyphs, minibatches
from bilevel.data.episodes import episodes
from bilevel.data.imageset import ImageSet
from bilevel.problems import conv4, fewshot, hypercleaning, quadratic, ridge

LETTERS = "ABCDEFGHIJKLMNOPRSTUVWXYZ0123456789"


@pytest.fixture(scope="session")
def full_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("glyphs")


@pytest.fixture(scope="session")
def full(full_cache):
    return glyphs.load(cache=full_cache)


@pytest.fixture(scope="session")
def letters(tmp_path_factory):
    return glyphs.load(LETTERS, cache=tmp_path_factory.mktemp("letters"))


@pytest.fixture(scope="module")
def digits():
    return hypercleaning.load()


def grad(value, x):
    return torch.autograd.grad(value, x)[0]


# --- importing


def test_importing_needs_torch_only():
    code = (
        "import sys, bilevel.data, bilevel.problems; "
        "print([m for m in ('sklearn', 'matplotlib', 'PIL', 'scipy') if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("module", "load"),
    [
        ("sklearn.datasets", ridge.load),
        ("sklearn.datasets", hypercleaning.load),
        ("sklearn.model_selection", hypercleaning.load),
        ("matplotlib", lambda: glyphs.load("A", cache="/nonexistent")),
        ("PIL.Image", lambda: glyphs.load("A", cache="/nonexistent")),
    ],
)
def test_a_missing_package_is_named_with_what_to_install(monkeypatch, module, load):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'{module}.*pip install "bilevel\[problems\]"'):
        load()


@pytest.mark.parametrize("module", [quadratic, ridge, hypercleaning, fewshot])
def test_every_setup_starts_with_device_and_seed(module):
    parameters = inspect.signature(module.setup).parameters
    assert list(parameters)[:2] == ["device", "seed"]
    assert (parameters["device"].default, parameters["seed"].default) == ("cpu", 0)


def test_setups_work_under_fake_tensors(letters):
    with FakeTensorMode():
        fake = ImageSet(torch.empty(letters.images.shape, dtype=torch.uint8), letters.counts, letters.names)
        for setup in (
            quadratic.setup,
            ridge.setup,
            hypercleaning.setup,
            lambda: fewshot.setup(data=fake, tasks=2, width=2),
        ):
            problem, outer, inner, batches = setup()
            if inner is None:  # losses of one task
                batches = bl.Batches(*([leaf[0] for leaf in batch] for batch in (batches.inner, batches.outer)))
                inner = problem.init(outer, batches.inner)
            for loss in (problem.inner(inner, outer, batches.inner), problem.outer(inner, outer, batches.outer)):
                assert isinstance(loss, FakeTensor)
                assert loss.shape == ()


# --- quadratic


def test_scalar_quadratic_has_the_known_numbers():
    q = quadratic.scalar()
    x, y0 = q.outer, torch.zeros(1, dtype=torch.float64)
    assert q.solution(x).item() == 0.5
    assert [q.iterate(x, y0, 0.25, k).item() for k in range(5)] == [0.0, 0.25, 0.375, 0.4375, 0.46875]
    assert q.hypergradient(x).item() == 0.25
    assert q.unrolled_hypergradient(x, y0, 0.25, 4).item() == 0.2197265625
    assert q.unrolled_hypergradient(x, y0, 0.25, 4, last=2).item() == 0.17578125
    assert q.solve_hypergradient(x, q.iterate(x, y0, 0.25, 4)).item() == 0.234375
    assert q.rate_derivative(x, y0, 0.25, 4).item() == 0.234375
    assert q.rate_derivative(x, y0, 0.25, 0).item() == 0.0


@pytest.mark.parametrize("last", [None, 3, 0, 50])
def test_quadratic_closed_forms_agree_with_autograd(last):
    q = quadratic.random(seed=3)
    x, lr, steps = q.outer.clone().requires_grad_(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True), 9
    start = torch.ones(6, dtype=torch.float64)
    y = start
    for step in range(steps):
        seen = last is None or step >= steps - last
        y = (y if seen else y.detach()) - lr * (q.hessian @ y - q.coupling @ (x if seen else x.detach()))
        y = y if seen else y.detach()
    torch.testing.assert_close(q.iterate(x, start, 0.7, steps), y.detach() + 0 * x.sum())
    value = quadratic.outer_loss(y, x, (q.target, q.penalty))
    torch.testing.assert_close(
        q.unrolled_hypergradient(x, start, 0.7, steps, last), torch.autograd.grad(value, x, retain_graph=True)[0]
    )
    if last is None:
        torch.testing.assert_close(q.rate_derivative(x, start, 0.7, steps).detach(), torch.autograd.grad(value, lr)[0])


def test_quadratic_hypergradient_is_the_derivative_of_its_value():
    q = quadratic.random(inner_size=5, outer_size=7, condition=100.0, penalty=0.3)
    x = q.outer.clone().requires_grad_()
    torch.testing.assert_close(q.hypergradient(x), grad(q.value(x), x))
    assert (
        grad(quadratic.inner_loss(y := q.solution(x).detach().requires_grad_(), x, (q.hessian, q.coupling)), y)
        .abs()
        .max()
        < 1e-12
    )
    eigenvalues = torch.linalg.eigvalsh(q.hessian)
    torch.testing.assert_close(eigenvalues[[0, -1]], torch.tensor([0.01, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("seed", [0, 1])
def test_estimators_return_the_quadratics_closed_forms(seed):
    q = quadratic.random(seed=seed)
    problem, outer, inner, batches = quadratic.setup(seed=seed)
    x = outer.detach()

    def estimate(estimator, steps=20):
        return bl.hypergradient(
            problem, outer, inner, batches, solver=bl.Descent(bl.SGD(lr=1.0), steps=steps), estimator=estimator
        )

    torch.testing.assert_close(estimate(bl.Unrolled()).grad, q.unrolled_hypergradient(x, inner, 1.0, 20))
    torch.testing.assert_close(estimate(bl.Unrolled(last=4)).grad, q.unrolled_hypergradient(x, inner, 1.0, 20, last=4))
    torch.testing.assert_close(estimate(bl.Unrolled()).inner, q.iterate(x, inner, 1.0, 20))
    implicit = estimate(bl.Implicit(bl.CG(max_steps=12, tol=1e-14)))
    torch.testing.assert_close(implicit.grad, q.solve_hypergradient(x, implicit.inner))
    torch.testing.assert_close(estimate(bl.Unrolled(), steps=400).grad, q.hypergradient(x))


def test_quadratic_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"condition=0\.5"):
        quadratic.random(condition=0.5)
    eye = torch.eye(2)
    with pytest.raises(ValueError, match=r"target \(3,\)"):
        quadratic.Quadratic(eye, eye, torch.ones(3), torch.ones(2))


# --- ridge


def test_ridge_data_are_standardised_and_split():
    data = ridge.load(seed=1)
    assert [len(part[1]) for part in (data.train, data.valid, data.test)] == [222, 110, 110]
    torch.testing.assert_close(data.train[0].mean(0), torch.zeros(10, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(data.train[0].std(0, correction=0), torch.ones(10, dtype=torch.float64))
    rows = torch.cat([data.train[0], data.valid[0], data.test[0]])
    assert len(torch.unique(rows, dim=0)) == 442
    assert torch.equal(data.train[0], ridge.load(seed=1).train[0])
    assert not torch.equal(data.train[0], ridge.load(seed=2).train[0])


def test_ridge_closed_forms_agree_with_autograd():
    problem, outer, _, batches = ridge.setup(seed=2, log_penalty=-1.0)
    w = ridge.solution(outer, batches.inner).requires_grad_()
    assert grad(problem.inner(w, outer, batches.inner), w).abs().max() < 1e-14
    x = outer["log_penalty"].detach().clone().requires_grad_()
    features, responses = batches.inner
    hessian = features.mT @ features / 222 + torch.diag(x.exp())
    value = ridge.outer_loss(torch.linalg.solve(hessian, features.mT @ responses / 222), outer, batches.outer)
    torch.testing.assert_close(ridge.hypergradient(outer, batches.inner, batches.outer)["log_penalty"], grad(value, x))


def test_learned_penalties_predict_unseen_patients_better():
    problem, outer, inner, batches = ridge.setup()
    data = ridge.load()

    def test_loss():
        return ridge.outer_loss(ridge.solution(outer, data.train), outer, data.test).item()

    before = test_loss()
    optimizer = torch.optim.Adam(outer.values(), lr=0.3)
    solver = bl.Descent(bl.SGD(lr=ridge.step_size), steps=30)
    steps = list(
        bl.iterate(
            problem,
            outer,
            inner,
            [batches] * 40,
            solver=solver,
            estimator=bl.Implicit(bl.CG(10, tol=1e-10)),
            optimizer=optimizer,
        )
    )
    assert steps[-1].outer_loss < 0.97 * steps[0].outer_loss
    assert test_loss() < 0.96 * before


# --- hyper-cleaning


def test_digits_are_split_and_corrupted_as_promised(digits):
    assert [len(y) for y in (digits.train_y, digits.valid_y, digits.test_y)] == [1000, 300, 497]
    assert digits.train_x.min() == 0
    assert digits.train_x.max() == 1
    assert int(digits.corrupted.sum()) == 400
    assert torch.equal(digits.train_y != digits.clean_y, digits.corrupted)
    for labels in (digits.clean_y, digits.valid_y, digits.test_y):
        counts = torch.bincount(labels, minlength=10)
        assert counts.max() - counts.min() <= 0.02 * len(labels)
    # all nine wrong labels: 400 draws, 44 expected each
    shifts = torch.bincount((digits.train_y - digits.clean_y)[digits.corrupted] % 10, minlength=10)
    assert shifts[0] == 0
    assert shifts[1:].min() > 20
    rows = torch.cat([digits.train_x, digits.valid_x, digits.test_x])
    assert len(torch.unique(rows, dim=0)) == 1797


def test_digits_depend_on_the_seed_only(digits):
    again, other = hypercleaning.load(), hypercleaning.load(seed=1)
    assert torch.equal(digits.train_y, again.train_y)
    assert torch.equal(digits.test_x, again.test_x)
    assert not torch.equal(digits.train_x, other.train_x)
    assert not hypercleaning.load(corruption=0.0).corrupted.any()
    assert hypercleaning.load(dtype=torch.float64).valid_x.dtype == torch.float64


def test_digits_refuse_bad_shares():
    with pytest.raises(ValueError, match=r"corruption=1\.5"):
        hypercleaning.load(corruption=1.5)
    with pytest.raises(ValueError, match="train=1500"):
        hypercleaning.load(train=1500)


def test_hypercleaning_losses_are_what_the_formula_says(digits):
    problem, _, inner, batches = hypercleaning.setup(l2=0.01, data=digits)
    assert {name: tuple(tensor.shape) for name, tensor in inner.items()} == {
        "0.weight": (256, 64), "0.bias": (256,), "2.weight": (10, 256), "2.bias": (10,),
    }  # fmt: skip
    logits = torch.linspace(-2, 2, 1000)
    steps = hypercleaning.minibatches(batches.inner, size=50, steps=41, seed=5)
    images, labels, index = steps[7]
    hidden = torch.relu(images @ inner["0.weight"].T + inner["0.bias"])
    losses = -torch.log_softmax(hidden @ inner["2.weight"].T + inner["2.bias"], 1)[torch.arange(50), labels]
    expected = (torch.sigmoid(logits[index]) * losses).mean() + 0.005 * sum(
        tensor.pow(2).sum() for tensor in inner.values()
    )
    torch.testing.assert_close(problem.inner(inner, {"logits": logits}, (images, labels, index)), expected)
    assert torch.equal(images, digits.train_x[index])
    # 20 batches are one pass, in which every example comes once; the second pass has another order
    passes = [torch.cat([steps[k][2] for k in range(start, start + 20)]) for start in (0, 20)]
    assert all(torch.equal(seen.sort().values, torch.arange(1000)) for seen in passes)
    assert not torch.equal(*passes)
    for wrong in (0, 1001):
        with pytest.raises(ValueError, match=f"size={wrong}"):
            hypercleaning.minibatches(batches.inner, size=wrong, steps=1)


def test_minibatches_repeat_an_example_only_when_all_had_their_turn():
    batches = minibatches.rows(count=10, size=4, steps=15, seed=2)
    assert all(len(set(batch)) == 4 for batch in batches)
    everyone = list(itertools.chain(*batches))
    for start in range(0, 60, 10):
        assert sorted(everyone[start : start + 10]) == list(range(10))
    assert batches == minibatches.rows(count=10, size=4, steps=15, seed=2)
    assert batches != minibatches.rows(count=10, size=4, steps=15, seed=3)
    assert sorted(minibatches.rows(count=2, size=5, steps=2)[0]) in ([0, 0, 0, 1, 1], [0, 0, 1, 1, 1])
    for wrong in ("count", "size", "steps"):
        with pytest.raises(ValueError, match=f"{wrong}=0"):
            minibatches.rows(**{"count": 3, "size": 2, "steps": 1, wrong: 0})


def test_minibatch_hypergradients_reach_only_the_weights_they_saw(digits):
    problem, outer, inner, batches = hypercleaning.setup(hidden=8, data=digits)
    steps = hypercleaning.minibatches(batches.inner, size=100, steps=3)
    hg = bl.hypergradient(
        problem,
        outer,
        inner,
        bl.Batches(steps, batches.outer),
        solver=bl.Descent(bl.SGD(lr=0.5), steps=3),
        estimator=bl.Unrolled(),
    )
    seen = torch.zeros(1000, dtype=torch.bool)
    seen[torch.cat([steps[k][2] for k in range(3)])] = True
    assert torch.equal(hg.grad["logits"] != 0, seen)


def test_evaluate_separates_perfect_from_useless_weights(digits):
    perfect = hypercleaning.evaluate({"logits": torch.where(digits.corrupted, -8.0, 8.0)}, digits, steps=150)
    assert perfect["corruption_auc"] == 1.0
    assert perfect["test_accuracy"] > 0.94
    assert perfect["test_accuracy"] > perfect["baseline_test_accuracy"] + 0.1
    assert abs(perfect["test_accuracy"] - perfect["ideal_test_accuracy"]) < 0.02
    useless = hypercleaning.evaluate({"logits": torch.zeros(1000)}, digits, steps=5)
    assert useless["corruption_auc"] == 0.5
    assert useless["test_accuracy"] == useless["baseline_test_accuracy"]
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    pairs = logits[digits.corrupted][:, None] < logits[~digits.corrupted][None]
    assert hypercleaning.evaluate({"logits": logits}, digits, steps=1)["corruption_auc"] == pytest.approx(
        pairs.double().mean().item()
    )
    assert math.isnan(
        hypercleaning.evaluate({"logits": logits}, hypercleaning.load(corruption=0.0), steps=1)["corruption_auc"]
    )
    with pytest.raises(ValueError, match="one for each of the 1000"):
        hypercleaning.evaluate({"logits": torch.zeros(3)}, digits)


def test_learned_weights_find_the_corrupted_labels(digits):
    problem, outer, inner, batches = hypercleaning.setup(hidden=64, data=digits)
    solver = bl.Descent(bl.SGD(lr=hypercleaning.INNER_LR), steps=20)
    optimizer = torch.optim.Adam(outer.values(), lr=hypercleaning.OUTER_LR)
    for step in bl.iterate(
        problem,
        outer,
        inner,
        [batches] * 30,
        solver=solver,
        estimator=bl.Implicit(bl.Neumann(10, 0.3, damping=0.1)),
        optimizer=optimizer,
    ):
        assert torch.isfinite(step.outer_loss)
    found = hypercleaning.evaluate(outer, digits, hidden=64, steps=200)
    assert found["corruption_auc"] > 0.9
    assert found["test_accuracy"] > found["baseline_test_accuracy"] + 0.08


# --- glyphs


def test_the_full_set_has_thousands_of_distinct_characters(full, full_cache):
    assert len(full) > 4500
    assert full.images.shape == (20 * len(full), 1, 28, 28)
    assert set(full.counts) == {20}
    assert list(full.names) == sorted(full.names)
    scripts = {"A", "ж", "Ω", "ש", "ع", "ა", "ກ", "ᐁ", "ⴰ", "∮"}
    assert scripts <= set(full.names)
    flat = full.images.flatten(1)
    # no picture comes twice, neither within a class nor in two classes
    assert len({row.tobytes() for row in flat.numpy()}) == len(flat)
    assert flat.amax(1).min() > 60  # every image has ink
    files = list(full_cache.iterdir())
    assert len(files) == 1
    assert files[0].stat().st_size < 100e6


def test_regular_images_of_different_characters_differ_clearly(full):
    plain = full.images[::20].flatten(1).float()
    squares = plain.pow(2).sum(1)
    closest = 1.0
    for rows in torch.arange(len(plain)).split(1024):
        distance = (squares[rows, None] + squares[None] - 2 * plain[rows] @ plain.T) / torch.maximum(
            squares[rows, None], squares[None]
        )
        distance[torch.arange(len(rows)), rows] = 1.0
        closest = min(closest, distance.min().item())
    assert closest > 0.08**2


def test_splits_of_the_full_set_share_no_character(full, full_cache, monkeypatch):
    parts = full.split(seed=0)
    names = {part: set(data.names) for part, data in parts.items()}
    assert sum(map(len, names.values())) == len(full) == len(set().union(*names.values()))
    assert [round(len(names[part]) / len(full), 2) for part in ("train", "validation", "test")] == [0.64, 0.16, 0.2]
    assert names["train"] != set(full.split(seed=1)["train"].names)
    monkeypatch.setenv("BILEVEL_CACHE", str(full_cache))
    loaded = fewshot.load("validation")
    assert loaded.names == parts["validation"].names
    assert torch.equal(loaded.images, parts["validation"].images)
    with pytest.raises(ValueError, match="split='valid'"):
        fewshot.load("valid")


def test_look_alikes_blanks_and_marks_are_left_out(tmp_path):
    latin_cyrillic_greek = "AАΑ"  # noqa: RUF001
    marks_and_blanks = "\u0301\u20dd \u00a0\u2003\t\u200d\ufffd\ue000"
    variants = "²𝐁𝔻" + "ﺟ"
    data = glyphs.load(latin_cyrillic_greek + marks_and_blanks + variants + "2BDج", cache=tmp_path)
    assert data.names == ("2", "A", "B", "D", "ج", "ﺟ")
    with pytest.raises(ValueError, match="no usable character"):
        glyphs.load(marks_and_blanks, cache=tmp_path)
    with pytest.raises(ValueError, match="per_class=0"):
        glyphs.load("A", per_class=0)


def test_glyphs_of_a_character_do_not_depend_on_the_others(letters, tmp_path):
    pair = glyphs.load("ZB", cache=tmp_path)
    index = letters.names.index("Z")
    assert pair.names == ("B", "Z")
    assert torch.equal(pair.select([1]).images, letters.select([index]).images)
    ink = pair.images.float().mean((1, 2, 3)) / 255
    assert ink.min() > 0.02
    assert ink.max() < 0.5
    assert len(glyphs.load("A", per_class=31, cache=tmp_path).images) == 31


def test_the_cache_is_used_checked_and_reproduced_byte_for_byte(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BILEVEL_CACHE", str(tmp_path / "new" / "folder"))
    first = glyphs.load("AБ")
    (path,) = (tmp_path / "new" / "folder").iterdir()
    content = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(glyphs, "_draw", lambda *_: pytest.fail("drew again in spite of a sound cache file"))
        assert torch.equal(glyphs.load("БA").images, first.images)
    for broken in (
        content[:-1],
        content[:200] + b"\0" + content[201:],
        b"",
        b"no newline",
        content.replace(b"\n", b" "),
    ):
        path.write_bytes(broken)
        assert torch.equal(glyphs.load("AБ").images, first.images)
        assert path.read_bytes() == content
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]  # no temporary file is left
    for change in ({"FORMAT": glyphs.FORMAT + 1}, {"_version": lambda name: "0.0"}):
        with monkeypatch.context() as patch:
            for name, value in change.items():
                patch.setattr(glyphs, name, value)
            glyphs.load("AБ")
    assert len(list(path.parent.iterdir())) == 3
    assert capsys.readouterr().err == ""  # quick work is silent


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("BILEVEL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert _cache.folder() == tmp_path / "bilevel"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert _cache.folder() == tmp_path / "home" / ".cache" / "bilevel"
    monkeypatch.setenv("BILEVEL_CACHE", "~/mine")
    assert _cache.folder() == tmp_path / "home" / "mine"


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="BILEVEL_CACHE"):
        data = glyphs.load("A", cache=tmp_path / "file" / "below")
    assert data.names == ("A",)


def test_a_user_without_a_home_folder_gets_the_data_and_a_warning(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("BILEVEL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(_cache.pathlib.Path, "home", no_home)
    with pytest.warns(UserWarning, match=r"could not keep glyphs .Could not determine home.*BILEVEL_CACHE"):
        assert glyphs.load("A").names == ("A",)


def test_a_cache_that_may_only_be_read_is_read_in_silence_and_never_half_written(tmp_path, monkeypatch):
    first = glyphs.load("A", cache=tmp_path)

    def refuse(path, content):  # the tests may run as root, whom permissions do not stop
        with path.open("wb") as file:
            file.write(content[:100])
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(_cache.pathlib.Path, "write_bytes", refuse)
    assert torch.equal(glyphs.load("A", cache=tmp_path).images, first.images)  # warnings are errors
    with pytest.warns(UserWarning, match="Permission denied"):
        glyphs.load("B", cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


_DIGEST = """
import hashlib, json, sys
import torch
from bilevel.data import episodes, glyphs, library, minibatches
from bilevel.space import tree

drawn = glyphs.load("ABCDEFGHIJKLMNOP", cache=sys.argv[1])
parts = [vars(library.load(3)), drawn.images]
parts += [drawn.split(seed=3)["train"].images, episodes.episodes(drawn, tasks=2, shot=1, query=2, seed=3)]
values = [leaf.tolist() for leaf in tree.tensors(parts)] + [minibatches.rows(10, 3, 9, seed=3)]
print(hashlib.sha256(json.dumps(values).encode()).hexdigest())
"""


def test_a_seed_means_the_same_in_two_processes_that_build_the_cache_at_once(tmp_path):
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", _DIGEST, str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": os.getcwd(), "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
        )
        for seed in ("1", "2")
    ]
    ended = [process.communicate() for process in started]
    assert [error for _, error in ended] == ["", ""]
    assert len(ended[0][0].strip()) == 64
    assert ended[0][0] == ended[1][0]
    assert [path.suffix for path in tmp_path.iterdir()] == [".bin"]


def test_progress_speaks_only_when_it_takes_long(capsys, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(glyphs.time, "monotonic", lambda: float(next(clock)))
    assert list(glyphs._progress(range(10), "drawing")) == list(range(10))
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 3
    assert "drawing" in lines[0]


# --- image sets and episodes


def numbered(counts):
    """An image set whose image i has the value i everywhere."""
    images = torch.arange(sum(counts), dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 28, 28).clone()
    return ImageSet(images, tuple(counts), tuple(f"class {index}" for index in range(len(counts))))


def test_image_sets_select_and_rotate():
    data = numbered([2, 3, 1])
    assert data.labels.tolist() == [0, 0, 1, 1, 1, 2]
    chosen = data.select([2, 1])
    assert chosen.images[:, 0, 0, 0].tolist() == [5, 2, 3, 4]
    assert (chosen.counts, chosen.names) == ((1, 3), ("class 2", "class 1"))
    corner = ImageSet(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), (1,), ("dot",))
    corner.images[0, 0, 0, 0] = 255
    turned = corner.rotated()
    assert turned.names == ("dot/rot000", "dot/rot090", "dot/rot180", "dot/rot270")
    assert [tuple(image[0].nonzero()[0].tolist()) for image in turned.images] == [(0, 0), (3, 0), (3, 3), (0, 3)]
    for fractions in ((0.5, 0.5, 0.5), (math.nan, 0.0, 1.0), (1.5, -0.5, 0.0), (0.5, 0.5)):
        with pytest.raises(ValueError, match="sum to 1"):
            data.split(fractions)
    with pytest.raises(IndexError, match="class 3; there are 3"):
        data.select([0, 3])
    with pytest.raises(ValueError, match=r"counts=\(7, -1\).*none negative"):
        ImageSet(data.images, (7, -1), ("a", "b"))
    assert ImageSet(data.images, torch.tensor([2, 4]), ["a", "b"]).rotated().counts == (2, 4) * 4
    with pytest.raises(TypeError, match="uint8"):
        ImageSet(torch.zeros(1, 1, 4, 4), (1,), ("a",))
    with pytest.raises(ValueError, match="sum to 3"):
        ImageSet(data.images, (1, 2), ("a", "b"))


@pytest.mark.parametrize("shot", [1, 5])
def test_episodes_draw_disjoint_support_and_query_of_the_right_classes(shot):
    data = numbered([20] * 10)
    (x, y), (query_x, query_y) = episodes(data, tasks=6, way=5, shot=shot, query=7, seed=3)
    assert (x.shape, query_x.shape) == ((6, 5 * shot, 1, 28, 28), (6, 35, 1, 28, 28))
    assert (x.dtype, y.dtype) == (torch.float32, torch.long)
    assert query_y.shape == (6, 35)
    images = (x[:, :, 0, 0, 0] * 255).round().long()
    queries = (query_x[:, :, 0, 0, 0] * 255).round().long()
    for task in range(6):
        both = torch.cat([images[task], queries[task]])
        assert len(set(both.tolist())) == len(both)
        labels = torch.cat([y[task], query_y[task]])
        # one true class behind each label, and another behind each other one
        behind = [{int(image) // 20 for image in both[labels == label]} for label in range(5)]
        assert [len(classes) for classes in behind] == [1] * 5
        assert len(set.union(*behind)) == 5
    assert torch.bincount(query_y.reshape(-1)).tolist() == [42] * 5


def test_episodes_depend_on_the_seed_only(letters):
    def draw(seed, tasks=3):
        return episodes(letters, tasks=tasks, way=5, shot=2, query=3, seed=seed)

    state = torch.get_rng_state()
    (x, _), (query_x, _) = draw(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, draw(0)[0][0])
    assert torch.equal(query_x, draw(0)[1][0])
    assert not torch.equal(x, draw(1)[0][0])
    assert torch.equal(draw(0, tasks=1)[0][0][0], x[0])
    assert x.min() >= 0
    assert x.max() == 1


def test_episodes_say_what_is_lacking():
    data = numbered([20, 20, 4])
    with pytest.raises(ValueError, match="way=5, but the data have 3 classes"):
        episodes(data, tasks=1, way=5)
    with pytest.raises(ValueError, match=r"5 images of each class, but class 'class 2' has 4"):
        episodes(data, tasks=1, way=2, shot=1, query=4)
    with pytest.raises(ValueError, match="tasks=0"):
        episodes(data, tasks=0)
    with pytest.raises(ValueError, match="have 0 classes"):
        episodes(data.select([]), tasks=1)
    with pytest.raises(ValueError, match=r"dtype=torch\.uint8"):
        episodes(data, tasks=1, way=2, shot=1, query=1, dtype=torch.uint8)


# --- few-shot


def test_conv4_is_the_usual_network_and_leaves_random_state_alone():
    state = torch.get_rng_state()
    module = conv4.conv4(way=5, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert (
        sum(parameter.numel() for parameter in module.parameters())
        == (9 * 32 + 32) + 3 * (9 * 32 * 32 + 32) + 4 * 64 + 32 * 5 + 5
    )
    assert not list(module.buffers())
    assert torch.equal(module[0].weight, conv4.conv4(way=5, seed=1)[0].weight)
    assert not torch.equal(module[0].weight, conv4.conv4(way=5, seed=2)[0].weight)
    assert conv4.conv4(way=3, channels=3, side=32)(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    with pytest.raises(ValueError, match="side=15"):
        conv4.conv4(side=15)


def test_fewshot_setup_poses_maml(letters):
    problem, outer, inner, batches = fewshot.setup(tasks=3, shot=1, query=2, data=letters, width=4, dtype=torch.float64)
    assert inner is None
    assert batches.inner[0].shape == (3, 5, 1, 28, 28)
    assert batches.outer[1].shape == (3, 10)

    def estimate(chunk):
        return bl.hypergradient(
            problem,
            outer,
            None,
            batches,
            solver=bl.Descent(bl.SGD(lr=0.1), steps=2),
            estimator=bl.TaskMean(bl.Unrolled(), chunk=chunk),
        )

    together, single = estimate(None), estimate(1)
    assert {name: leaf.shape for name, leaf in together.grad.items()} == {
        name: leaf.shape for name, leaf in outer.items()
    }
    torch.testing.assert_close(together.grad, single.grad)

    # by hand: two steps on each task, differentiated
    call, _ = bl.functional(conv4.conv4(width=4).double())
    loss = torch.nn.functional.cross_entropy
    total = torch.zeros((), dtype=torch.float64)
    for x, y, query_x, query_y in zip(*batches.inner, *batches.outer, strict=True):
        params = dict(outer)
        for _ in range(2):
            gradients = torch.autograd.grad(loss(call(params, x), y), list(params.values()), create_graph=True)
            params = {
                name: leaf - 0.1 * gradient for (name, leaf), gradient in zip(params.items(), gradients, strict=True)
            }
        total = total + loss(call(params, query_x), query_y) / 3
    expected = torch.autograd.grad(total, list(outer.values()))
    torch.testing.assert_close(list(together.grad.values()), list(expected))


def test_stream_draws_fresh_tasks_reproducibly(letters):
    first = [batches.inner[0] for batches in fewshot.stream(letters, steps=3, tasks=2, query=2)]
    again = [batches.inner[0] for batches in itertools.islice(fewshot.stream(letters, tasks=2, query=2), 3)]
    other = [batches.inner[0] for batches in fewshot.stream(letters, steps=3, tasks=2, query=2, seed=1)]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(first + other, 2))


def test_meta_training_improves_accuracy_on_unseen_characters(letters):
    parts = letters.split((0.6, 0.0, 0.4), seed=0)
    problem, outer, _, _ = fewshot.setup(data=parts["train"], width=8)

    def accuracy():
        return fewshot.evaluate(outer, parts["test"], tasks=20, shot=1, query=5, steps=3)

    before = accuracy()
    assert before == accuracy()
    assert abs(before["unadapted_accuracy"] - 0.2) < 0.1
    assert 0.01 < before["accuracy_interval"] < 0.12
    batches = fewshot.stream(parts["train"], steps=40, shot=1, query=5, seed=1)
    solver, estimator = bl.Descent(bl.SGD(lr=fewshot.INNER_LR), steps=1), bl.TaskMean(bl.FirstOrder())
    for _ in bl.iterate(
        problem,
        outer,
        None,
        batches,
        solver=solver,
        estimator=estimator,
        optimizer=torch.optim.Adam(outer.values(), lr=5e-3),
    ):
        pass
    after = accuracy()
    assert after["accuracy"] > before["accuracy"] + 0.1


def test_fewshot_evaluate_refuses_what_has_no_answer(letters):
    _, outer, _, _ = fewshot.setup(data=letters, width=4)
    with pytest.raises(ValueError, match="tasks=1"):
        fewshot.evaluate(outer, letters, tasks=1)
    with pytest.raises(ValueError, match="way=4, but the network has 5 outputs"):
        fewshot.evaluate(outer, letters, way=4)
    wide = ImageSet(torch.zeros(6, 1, 28, 32, dtype=torch.uint8), (3, 3), ("a", "b"))
    with pytest.raises(ValueError, match="28 x 32; the network"):
        fewshot.setup(data=wide, way=2, shot=1, query=1)
