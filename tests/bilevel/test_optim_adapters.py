"""Adapters of torch.optim classes and TorchOpt transformations: their steps, their derivatives, what is refused."""

import pytest
import torch
from optim_cases import STEPS, gradient_of, loss_of, numbers_in_float64, ours, start

import bilevel as bl

o = bl.optim
D = torch.float64
NONE = bl.Batches(None, None)


def learned(name):
    return lambda x: x[name]


TORCH = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1}),
    "adam": (torch.optim.Adam, {"lr": 0.1, "amsgrad": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.1}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.5, "centered": True}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1}),
    "adadelta": (torch.optim.Adadelta, {"lr": 1.0}),
    "nadam": (torch.optim.NAdam, {"lr": 0.1}),
    "radam": (torch.optim.RAdam, {"lr": 0.1}),
    "adamax": (torch.optim.Adamax, {"lr": 0.1}),
    "asgd": (torch.optim.ASGD, {"lr": 0.1, "lambd": 0.1, "t0": 3}),
    "rprop": (torch.optim.Rprop, {"lr": 0.1}),
}


@pytest.mark.parametrize("name", TORCH)
@numbers_in_float64()
def test_a_torch_class_adapted_takes_its_steps_also_where_tensors_are_left_out(name):
    kind, settings = TORCH[name]
    optimizer, y = o.FromTorch(kind, **settings), start()
    state, theirs = optimizer.init(y), {key: leaf.clone() for key, leaf in y.items()}
    structure, other = torch.utils._pytree.tree_structure(state), kind(list(theirs.values()), **settings)
    for step in range(STEPS):
        g = {k: None if k == "b" and step % 3 == 0 else leaf for k, leaf in gradient_of(theirs).items()}
        y, state = optimizer.step(g, state, y, None)
        assert torch.utils._pytree.tree_structure(state) == structure
        for key, leaf in theirs.items():
            leaf.grad = g[key]
        other.step()
        for key, leaf in theirs.items():
            torch.testing.assert_close(y[key], leaf, rtol=1e-12, atol=1e-12)


def test_bias_corrections_are_in_float64_whatever_the_default_dtype_where_torchs_own_are_not():
    def differentiable(y):
        return torch.optim.Adam(list(y.values()), lr=0.1, differentiable=True)

    theirs = {name: leaf.clone() for name, leaf in start().items()}
    for name, leaf in gradient_of(theirs).items():
        theirs[name].grad = leaf
    optimizer = differentiable(theirs)
    optimizer.step()
    path, exact = ours(o.FromTorch(torch.optim.Adam, lr=0.1), None), ours(bl.Adam(0.1), None)
    for name in theirs:
        torch.testing.assert_close(path[-1][name], exact[-1][name], rtol=1e-12, atol=1e-12)
    assert (theirs["w"] - exact[0]["w"]).abs().max() > 1e-7, "torch has mended it"


class Scaled(torch.optim.Optimizer):
    """A class of a user's own; `flaw` says what is wrong with it."""

    calls = 0

    def __init__(self, params, lr=0.1, flaw=None, differentiable=False):
        super().__init__(params, {"lr": lr, "differentiable": differentiable})
        self.flaw, self.count = flaw, 0

    def step(self):
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            Scaled.calls += 1
            rate = self.param_groups[0]["lr"]
            if self.flaw == "attribute":
                self.count += 1
                rate /= self.count
            if self.flaw == "class":
                rate /= Scaled.calls
            if self.flaw == "group":
                self.param_groups[0]["lr"] = 0.9 * rate
            for p in self.param_groups[0]["params"]:
                g = p.grad.detach() if self.flaw == "detached" else p.grad
                if self.flaw == "in place":
                    g.mul_(2.0)
                state = self.state[p]
                state["past"] = state.get("past", 0.0) * 0.5 + g
                state["k"] = state.get("k", 0) + 1
                p.sub_(rate / state["k"] * (state["past"] + p))


def test_a_torch_class_of_ones_own_with_numbers_in_its_state():
    optimizer, y = o.FromTorch(Scaled, lr=0.2), start()
    path = ours(optimizer, None)
    theirs = {key: leaf.clone() for key, leaf in y.items()}
    other = Scaled(list(theirs.values()), lr=0.2)
    for step in range(STEPS):
        for key, leaf in gradient_of(theirs).items():
            theirs[key].grad = leaf
        other.step()
        for key, leaf in theirs.items():
            torch.testing.assert_close(path[step][key], leaf, rtol=1e-12, atol=1e-12)


ADAPTED_WRONGLY = {
    "attribute": (lambda: o.FromTorch(Scaled, flaw="attribute"), "counts in its own attributes or groups"),
    "group": (lambda: o.FromTorch(Scaled, flaw="group"), "counts in its own attributes or groups"),
    "class": (lambda: o.FromTorch(Scaled, flaw="class"), "keeps something"),
    "detached": (lambda: o.FromTorch(Scaled, flaw="detached"), r"not differentiable.*central differences say"),
    "in place": (lambda: o.FromTorch(Scaled, flaw="in place"), "in place|not differentiable|others when its state"),
    "momentum of torch": (
        lambda: o.FromTorch(torch.optim.SGD, lr=0.1, momentum=0.9),
        r"not differentiable.*the gradient of step 0 autograd says \[0.0, 0.0, 0.0\]",
    ),
    "closure": (lambda: o.FromTorch(torch.optim.LBFGS), "LBFGS, whose step needs a closure"),
    "muon": (lambda: o.FromTorch(torch.optim.Muon), "no option differentiable=True.*bilevel.optim.Muon"),
    "adafactor": (lambda: o.FromTorch(torch.optim.Adafactor), "no option differentiable=True"),
    "foreach": (lambda: o.FromTorch(torch.optim.Adam, foreach=True), "foreach=True; leave it out"),
    "fused": (lambda: o.FromTorch(torch.optim.Adam, fused=True), "fused=True; leave it out"),
    "maximize": (lambda: o.FromTorch(torch.optim.Adam, maximize=True), "write -inner_loss"),
    "a learned rate": (lambda: o.FromTorch(torch.optim.Adam, lr=torch.tensor(0.1)), "a number was needed"),
    "a function": (lambda: o.FromTorch(torch.optim.Adam, lr=learned("lr")), "a number was needed"),
    "no class": (lambda: o.FromTorch(torch.optim.Adam([torch.zeros(1)])), "a class of torch.optim was needed"),
    "no transform": (lambda: o.FromTorchopt(torch.optim.Adam), "a gradient transformation"),
}


@pytest.mark.parametrize("name", ADAPTED_WRONGLY)
def test_what_does_not_meet_the_condition_of_an_adapter_is_refused(name):
    make, message = ADAPTED_WRONGLY[name]
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.filterwarnings("ignore")
class TestTorchopt:
    @pytest.fixture(scope="class")
    def torchopt(self):
        return pytest.importorskip("torchopt")

    @pytest.mark.parametrize("kind", ["adam", "sgd", "rmsprop", "adagrad", "adadelta", "radam", "adamax", "adamw"])
    def test_a_transformation_takes_its_steps_and_has_the_derivative_of_the_program(self, torchopt, kind):
        transform = getattr(torchopt, kind)(lr=0.05, **({"momentum": 0.5} if kind == "sgd" else {}))
        optimizer = o.FromTorchopt(transform, scale=learned("scale"))
        x, y = {"scale": torch.tensor(1.0, dtype=D), "a": torch.tensor(0.4, dtype=D)}, start()
        path, params, state = ours(optimizer, x), start(), transform.init(start())
        for step in range(STEPS):
            updates, state = transform.update(gradient_of(params), state, params=params, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
            for key in params:
                torch.testing.assert_close(path[step][key], params[key], rtol=1e-12, atol=1e-12)
        problem = bl.Problem(
            lambda y, x, b: loss_of(y) + x["a"] * y["w"].sin().sum(), lambda y, x, b: y["w"].square().sum() + y["scale"]
        )

        def value(x):
            return bl.adapt(problem, x, y, NONE, solver=bl.Descent(optimizer, 5)).inner

        for keep in ("graph", "iterates"):
            found = bl.hypergradient(problem, x, y, NONE, solver=bl.Descent(optimizer, 5), estimator=bl.Unrolled(keep))
            for key in x:
                ends = [value(x | {key: x[key] + sign * 1e-6}) for sign in (1, -1)]
                up, down = (problem.outer_loss(end, x, None) for end in ends)
                torch.testing.assert_close(found.grad[key], (up - down) / 2e-6, rtol=1e-6, atol=1e-8)

    def test_a_clip_whose_derivative_torchopt_leaves_out_is_refused(self, torchopt):
        chain = torchopt.combine.chain(torchopt.clip.clip_grad_norm(max_norm=0.5), torchopt.sgd(lr=0.1))
        with pytest.raises(ValueError, match=r"not differentiable.*central differences"):
            o.FromTorchopt(chain)

    def test_what_it_is_told_of_its_rest_is_held_against_a_step(self, torchopt):
        problem = bl.Problem(lambda y, x, b: ((y - x) ** 2).sum(), lambda y, x, b: (y**2).sum())
        x, y = torch.ones(2, dtype=D), torch.zeros(2, dtype=D)
        for decay in (0.0, 0.5):
            sgd = torchopt.sgd(lr=0.4, weight_decay=decay)
            told = o.FromTorchopt(sgd, stationary=lambda g, y, x: g)
            for optimizer in (told, o.Accumulated(told, 2)):
                solver = bl.Descent(optimizer, 60)
                if decay:
                    with pytest.raises(ValueError, match=r"moves y where its stationarity\(\) is zero"):
                        bl.hypergradient(problem, x, y, NONE, solver=solver, estimator=bl.Implicit(bl.CG(3)))
                else:
                    found = bl.hypergradient(problem, x, y, NONE, solver=solver, estimator=bl.Implicit(bl.CG(3)))
                    torch.testing.assert_close(found.grad, 2 * x, rtol=1e-10, atol=1e-10)
        with pytest.raises(ValueError, match="does not say"):
            bl.hypergradient(
                problem, x, y, NONE, solver=bl.Descent(o.FromTorchopt(sgd), 3), estimator=bl.Implicit(bl.CG(3))
            )

    def test_a_transformation_that_mixes_entries_is_refused_over_tasks_and_one_at_a_time_it_is_right(self, torchopt):
        class Normed(tuple):
            """g / |g| over all tensors, with its derivative."""

            init = staticmethod(lambda params: ())

            @staticmethod
            def update(updates, state, *, params=None, inplace=True):
                norm = torch.stack([u.square().sum() for u in updates]).sum().sqrt()
                return tuple(-0.1 * u / norm for u in updates), state

        problem = bl.Problem(lambda y, x, b: ((y - b * x) ** 2).sum(), lambda y, x, b: (y**2).sum())
        x, y, tasks = torch.ones(2, dtype=D), torch.zeros(3, 2, dtype=D), torch.tensor([1.0, 2.0, -1.0], dtype=D)

        def call(y, batch, estimator):
            solver = bl.Descent(o.FromTorchopt(Normed()), 3)
            return bl.hypergradient(problem, x, y, bl.Batches(batch, None), solver=solver, estimator=estimator)

        with pytest.raises(ValueError, match="mixes tasks"):
            call(y, tasks, bl.TaskMean(bl.Unrolled()))
        found = call(y, tasks, bl.TaskMean(bl.Unrolled(), chunk=1))
        alone = [call(y[i], tasks[i], bl.Unrolled()).grad for i in range(3)]
        torch.testing.assert_close(found.grad, torch.stack(alone).mean(0), rtol=1e-12, atol=0)

    def test_a_tensor_that_the_loss_does_not_use_is_refused(self, torchopt):
        y, optimizer = start(), o.FromTorchopt(torchopt.adam(0.1))
        with pytest.raises(ValueError, match=r"no gradient for inner\['b'\]"):
            optimizer.step(gradient_of(y) | {"b": None}, optimizer.init(y), y, None)
