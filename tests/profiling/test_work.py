"""Work: FLOPs against torch's own counter, moved bytes and rooflines against counts made by hand."""

import pytest
import torch
from bilevel_profiling import forecast
from bilevel_profiling.meters.devices import DEVICES, Device
from bilevel_profiling.meters.work import Work
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import bilevel as bl

PERCEPTRON = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 3))
CONVOLUTION = nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Tanh(), nn.ConvTranspose2d(4, 2, 3))
GROUPED = nn.Conv1d(4, 8, 3, groups=2)
ATTENTION = nn.MultiheadAttention(8, 2)
SEQUENCE, IMAGES = torch.randn(5, 2, 8), torch.randn(2, 2, 8, 8)
QUERY = torch.randn(2, 2, 8, 4, requires_grad=True)


def passes(net, *inputs, order):
    """Forward, backward, double backward."""
    output = net(*inputs)
    loss = (output[0] if isinstance(output, tuple) else output).tanh().pow(2).sum()
    leaves = list(net.parameters())
    if order > 0:
        gradients = torch.autograd.grad(loss, leaves, create_graph=order > 1, allow_unused=True)
    if order > 1:
        torch.autograd.grad(
            sum(gradient.pow(2).sum() for gradient in gradients if gradient is not None), leaves, allow_unused=True
        )


CALLS = {
    **{
        f"{name}, order {order}": lambda net=net, inputs=inputs, order=order: passes(net, *inputs, order=order)
        for name, net, inputs in (
            ("perceptron", PERCEPTRON, (torch.randn(7, 10),)),
            ("convolution", CONVOLUTION, (IMAGES,)),
            ("grouped", GROUPED, (torch.randn(2, 4, 9),)),
            ("attention", ATTENTION, (SEQUENCE, SEQUENCE, SEQUENCE)),
        )
        for order in range(3)
    },
    "fused attention": lambda: torch.autograd.grad(F.scaled_dot_product_attention(QUERY, QUERY, QUERY).sum(), QUERY),
    "einsum": lambda: torch.einsum("bij,bjk->bik", torch.ones(2, 3, 4), torch.ones(2, 4, 5)),
    "baddbmm": lambda: torch.baddbmm(torch.ones(2, 3, 5), torch.ones(2, 3, 4), torch.ones(2, 4, 5)),
    "out=": lambda: torch.mm(torch.ones(3, 4), torch.ones(4, 5), out=torch.empty(3, 5)),
    "vmap": lambda: torch.func.vmap(lambda a: a @ a)(torch.ones(3, 4, 4)),
    "vmap of grad": lambda: torch.func.vmap(torch.func.grad(lambda a: (a @ a).sum()))(torch.ones(3, 4, 4)),
    "jvp": lambda: torch.func.jvp(lambda a: a @ a, (torch.ones(4, 4),), (torch.ones(4, 4),)),
    "checkpoint": lambda: (
        torch.utils.checkpoint.checkpoint(PERCEPTRON, torch.randn(7, 10), use_reentrant=False).sum().backward()
    ),
    "half": lambda: torch.ones(3, 4, dtype=torch.bfloat16) @ torch.ones(4, 5, dtype=torch.bfloat16),
    "empty": lambda: torch.ones(0, 4) @ torch.ones(4, 5),
    "elementwise": lambda: torch.ones(100).sin() + 1,
}


def worked(call, **options):
    with Work(**options) as meter:
        call()
    return meter


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", CALLS)
def test_flops_are_those_of_torchs_counter(name):
    with FlopCounterMode(display=False) as counter:
        CALLS[name]()
    assert worked(CALLS[name]).figures()["matmul_flops"] == counter.get_total_flops()


def test_flops_by_hand():
    """7 x 10 x 20 and 7 x 20 x 3 multiply-adds, forward; each layer twice more backward, but for the gradient of the
    input."""
    forward = 2 * 7 * (10 * 20 + 20 * 3)
    assert worked(CALLS["perceptron, order 0"]).figures()["matmul_flops"] == forward
    assert worked(CALLS["perceptron, order 1"]).figures()["matmul_flops"] == 3 * forward - 2 * 7 * 10 * 20
    assert worked(CALLS["empty"]).figures()["matmul_flops"] == 0


def test_flops_in_inference_mode():
    def call():
        with torch.inference_mode():
            PERCEPTRON(torch.ones(7, 10))

    with FlopCounterMode(display=False) as counter:
        call()
    assert worked(call).figures()["matmul_flops"] == counter.get_total_flops()


@pytest.mark.parametrize(
    "estimator", [bl.Unrolled(), bl.Unrolled("segments"), bl.Implicit(bl.CG(2)), bl.FirstOrderCorrected()], ids=repr
)
def test_phases_add_up_to_the_total(estimator):
    call, inner = bl.functional(PERCEPTRON)
    x, y = torch.randn(7, 10), torch.randint(0, 3, (7,))
    problem = bl.Problem(
        lambda w, v, b: (v.exp() * F.cross_entropy(call(w, x), y, reduction="none")).sum(),
        lambda w, v, b: F.cross_entropy(call(w, x), y),
    )
    with FlopCounterMode(display=False) as counter, Work() as meter:
        bl.hypergradient(
            problem,
            torch.zeros(7),
            inner,
            bl.Batches(None, None),
            solver=bl.Descent(bl.SGD(0.1), 3),
            estimator=estimator,
        )
    phases = meter.phases()
    assert set(phases) == {"inner", "hypergradient"}
    assert (
        sum(phase["matmul_flops"] for phase in phases.values())
        == meter.figures()["matmul_flops"]
        == counter.get_total_flops()
    )


A, B, C = torch.ones(100), torch.ones(100), torch.ones(10, 10)


@pytest.mark.parametrize(
    ("call", "numbers"),
    [
        (lambda: A + B, 300),
        (lambda: A + 1, 200),
        (lambda: A.sum(), 101),
        (lambda: A.clone().add_(B), 200 + 300),  # in place: both are read, one is written
        (lambda: torch.add(A, B, out=torch.empty(100)), 400),  # what is written to is counted as if it were read, too
        (lambda: torch.cat([A, B]), 400),
        (lambda: torch.stack([A, B]), 400),
        (lambda: C @ C.clone(), 200 + 300),
        (lambda: A.double(), 300),  # 400 and 800 bytes
        (lambda: A > B, 225),  # a byte each
        (lambda: torch.full((100,), 2.0), 100),
        (lambda: torch.split(A, 10), 0),
        (lambda: torch._foreach_add([A.clone(), B.clone()], 1.0), 400 + 400),
    ],
)
def test_moved_bytes_by_hand(call, numbers):
    assert worked(call).figures()["moved_bytes"] == 4 * numbers


@pytest.mark.parametrize(
    "view",
    [
        lambda: A.view(10, 10),
        lambda: A[10:20],
        lambda: C.t(),
        lambda: C[3],
        lambda: A.expand(5, 100),
        lambda: A.detach(),
        lambda: A.unsqueeze(0),
        lambda: A.reshape(10, 10),
        lambda: C.diagonal(),
        lambda: A.unfold(0, 3, 1),
        lambda: A.chunk(4),
        lambda: torch.view_as_complex(C.view(50, 2)),
        lambda: A.requires_grad_(False),
    ],
)
def test_views_move_nothing(view):
    assert worked(view).figures()["moved_bytes"] == 0


@pytest.mark.parametrize(
    ("call", "numbers"),
    [
        pytest.param(
            lambda: torch.ones(2, 3, 4) @ torch.ones(4, 5),
            24 + 20 + 24 + 20 + 30,
            id="a batched product: _unsafe_view copies nothing",
        ),
        pytest.param(lambda: C @ C, 200, id="an input that is given twice"),
        pytest.param(lambda: A[:1].expand(100) + 1, 101, id="an expanded input"),
        pytest.param(lambda: torch.empty(100), 0, id="nothing is written"),
    ],
)
def test_moved_bytes_that_are_counted_too_high(call, numbers):
    assert worked(call).figures()["moved_bytes"] == 4 * numbers


@pytest.mark.filterwarnings("ignore:Sparse")
def test_moved_bytes_of_a_sparse_tensor():
    sparse = torch.sparse_coo_tensor(torch.tensor([[0], [0]]), torch.ones(1), (10**6, 10**6))
    assert worked(lambda: sparse * 2).figures()["moved_bytes"] < 1000


SLOW = Device("slow", {"float32": 1e3, "bfloat16": 1e6}, bandwidth=1e3, memory=2**30)


def test_rooflines_are_sums_over_operators():
    a, b = torch.ones(8, 8), torch.ones(8, 8)
    moved, flops = 3 * 64 * 4, 2 * 8**3
    meter = worked(lambda: (a @ b, a + b, a @ b), device=SLOW)
    assert meter.figures()["roofline_device"] == "slow"
    assert meter.figures()["roofline_seconds"] == pytest.approx(2 * max(flops / 1e3, moved / 1e3) + moved / 1e3)
    fast = Device("fast", {"float32": 1e15}, bandwidth=1e3, memory=2**30)
    assert worked(lambda: a @ b, device=fast).figures()["roofline_seconds"] == pytest.approx(moved / 1e3)


def test_rooflines_know_the_dtype_and_take_an_unknown_one_for_float32():
    for dtype, rate in ((torch.bfloat16, 1e6), (torch.float32, 1e3), (torch.float64, 1e3)):
        a = torch.ones(64, 64, dtype=dtype)
        moved, flops = 3 * 64 * 64 * a.itemsize, 2 * 64**3
        device = Device("wide", SLOW.flops, bandwidth=1e12, memory=2**30)
        assert worked(lambda a=a: a @ a.clone(), device=device).figures()["roofline_seconds"] == pytest.approx(
            max(flops / rate, moved / 1e12) + 2 * moved / 3 / 1e12
        )


def test_views_and_no_device_cost_no_time():
    assert "roofline_seconds" not in worked(lambda: A + B).figures()
    assert worked(lambda: A.view(10, 10).t(), device=SLOW).figures()["roofline_seconds"] == 0


def test_a_forecast_works_as_much_as_a_run():
    def call():
        a = torch.ones(16, 16)
        return (a @ a.t()).tanh().sum()

    real, fake = worked(call, device=SLOW).figures(), forecast(call, on=SLOW)
    assert (fake.matmul_flops, fake.moved_bytes) == (real["matmul_flops"], real["moved_bytes"])
    assert fake.roofline_seconds == pytest.approx(real["roofline_seconds"])


def test_the_devices_are_plausible():
    for name, device in DEVICES.items():
        assert 1e12 < device.flops["float32"] <= device.flops["bfloat16"] == device.flops["float16"] < 2e15, name
        assert device.flops["float64"] <= device.flops["float32"]
        assert 2e11 < device.bandwidth < 1e13
        assert 15e9 < device.memory < 2e11


def test_work_before_an_error_is_counted():
    def call():
        torch.ones(8, 8) @ torch.ones(8, 8)
        raise KeyError

    meter = Work()
    with pytest.raises(KeyError), meter:
        call()
    assert meter.figures()["matmul_flops"] == 1024
    assert torch.utils._python_dispatch._len_torch_dispatch_stack() == 0


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_higher_order_operators_can_be_counted():
    from torch.nn.attention.flex_attention import flex_attention

    q = torch.ones(1, 1, 16, 16)
    worked(lambda: flex_attention(q, q, q))
