"""Time, memory and a profile of one call, for benchmarks/engine.py.

Memory is told by two meters: the bench folder's dispatch mode, which sees the storages of all results of operators (and
nothing inside a compiled graph), and the memory events of torch's profiler, which sees every call of the allocator.
"""

import contextlib
import gc
import time

import torch

_GROUPS = """
matrix products: aten::mm aten::addmm aten::bmm aten::baddbmm aten::linear mkldnn::_linear
convolutions, pools, norms: aten::convolution aten::_convolution aten::mkldnn_conv mkldnn::_conv aten::_slow_conv
    aten::thnn_conv aten::max_pool aten::native_batch_norm aten::batch_norm aten::_native_batch_norm aten::gather
    aten::scatter aten::native_group_norm
fused kernels: ##
Python and autograd: compiled: bilevel. _Gradient autograd:: AOTDispatcher detach torch::autograd:: PyTorch
activations: aten::gelu aten::_softmax aten::native_layer_norm NativeLayerNorm aten::relu aten::threshold
    aten::_log_softmax aten::log_softmax aten::nll_loss aten::sigmoid
sums and products: aten::add aten::mul aten::sub aten::sum aten::neg aten::pow aten::div aten::_foreach aten::rsub
    aten::mean aten::dot aten::linalg
copies: aten::copy_ aten::cat aten::fill_ aten::zero aten::clone aten::contiguous
allocation: aten::empty aten::resize aten::new_empty [memory]
"""  # by the beginnings of operators' names; "## Call CompiledFxGraph" is what TorchInductor's code is called
GROUPS = {
    name: tuple(begins.split())
    for name, _, begins in (line.partition(": ") for line in _GROUPS.strip().replace("\n    ", " ").splitlines())
}
REST = ("other operators", "outside of operators")


def seconds(function):
    """Process CPU seconds of one call."""
    gc.collect()
    start = time.process_time()
    found = function()
    spent = time.process_time() - start
    del found
    return spent


def dispatched(function):
    """Peak live bytes by the bench folder's dispatch mode."""
    from common import MemMeter

    gc.collect()
    with MemMeter() as meter:
        found = function()
    del found
    return meter.peak


def profiled(function, **options):
    """(The profile of one call on the CPU, its wall seconds)."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], **options) as profile:
        start = time.perf_counter()
        found = function()
        spent = time.perf_counter() - start
    del found
    return profile, spent


def allocated(function):
    """Peak bytes above those at the start by the allocator's events: of what was made since, and not yet freed."""
    profile, _ = profiled(function, profile_memory=True)
    events = (each for each in profile.profiler.kineto_results.events() if each.name() == "[memory]")
    now = peak = 0
    for _, change in sorted((each.start_ns(), each.nbytes()) for each in events):
        now += change
        peak = max(peak, now)
    return peak


def live_at_peak(function, most=20):
    """What was alive at the peak of a call, the largest first: {"bytes", "count", "made by"} of equal size and origin.

    "made by" is the way of operators and compiled functions that led to the allocation; tensors that were there before
    are not seen.
    """
    with _named_pieces():
        profile, _ = profiled(function, profile_memory=True)
    changes = []

    def visit(event, way):
        kind, fields = event.typed
        if kind == torch._C._profiler._EventType.Allocation:
            changes.append((event.start_time_ns, fields.ptr, fields.alloc_size, way))
            return
        way = (*way, event.name) if kind != torch._C._profiler._EventType.Kineto else way
        for child in event.children:
            visit(child, way)

    for root in profile.profiler.kineto_results.experimental_event_tree():
        visit(root, ())
    live, best, now, peak = {}, {}, 0, 0
    for _, pointer, size, way in sorted(changes, key=lambda change: change[0]):
        if size > 0:
            live[pointer] = (size, way)
        else:
            live.pop(pointer, None)
        now += size
        if now > peak:
            peak, best = now, dict(live)
    counts = {}
    for size, way in best.values():
        named = [each for each in way if each.startswith(("aten::", "compiled: ", "mkldnn::", "autograd::"))]
        place = " > ".join(dict.fromkeys([*named[:1], *named[-2:]])) or "outside of operators"
        counts[size, place] = counts.get((size, place), 0) + 1
    found = sorted(counts.items(), key=lambda item: -item[0][0] * item[1])[:most]
    return peak, [{"bytes": size, "count": count, "made by": place} for (size, place), count in found]


@contextlib.contextmanager
def _named_pieces():
    """Within it calls of compiled functions have names in a profile."""
    from bilevel.engine.compiled.piece import Piece

    plain = Piece.__call__

    def named(self, inputs):
        with torch.profiler.record_function(f"compiled: {self.name}"):
            return plain(self, inputs)

    Piece.__call__ = named
    try:
        yield
    finally:
        Piece.__call__ = plain


def groups(function):
    """Milliseconds of one call by group of operators, under torch's profiler, which itself slows Python down."""
    with _named_pieces():
        profile, spent = profiled(function)
    found = dict.fromkeys([*GROUPS, *REST], 0.0)
    for event in profile.key_averages():
        group = next((name for name, begins in GROUPS.items() if event.key.startswith(begins)), "other operators")
        found[group] += event.self_cpu_time_total / 1e3
    found["outside of operators"] = max(0.0, spent * 1e3 - sum(found.values()))
    return found
