"""trace(): one call as a timeline that chrome://tracing and https://ui.perfetto.dev open, with the library's spans in
it.

The spans are `torch.profiler` ranges already, so any torch trace shows them: bilevel.inner, bilevel.hypergradient and
bilevel.outer, with bilevel.inner_gradient, bilevel.outer_gradient, bilevel.hvp and bilevel.mixed inside. This is the
shortest way to such a trace. It is no meter: profiling slows the call down, and its numbers are for looking, not for a
record.
"""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

Result = TypeVar("Result")


def trace(call: Callable[[], Result], path: str | Path, *, memory: bool = False) -> Result:
    """Run `call` once under torch.profiler and write what happened as a Chrome trace (JSON; gzipped when `path` ends
    with .gz).

    On a machine with CUDA the kernels are in it, too. The trace is written also when the call raises. torch puts the
    machine's name into it.

    Args:
        call: a function without arguments.
        path: the file; it is replaced, its folder is made.
        memory: also draw a curve of the bytes that torch's allocators have given out, for each device; on the CPU
            counted from the call's start.

    Returns:
        What `call` returned.

    Raises:
        TypeError: `call` cannot be called.
        OSError: the file cannot be written.
        Exception: whatever `call` raises.

    Example:
        >>> import pathlib, tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     total = trace(lambda: torch.ones(3).sum(), f"{folder}/trace.json")
        ...     "aten::sum" in pathlib.Path(folder, "trace.json").read_text()
        True
        >>> total
        tensor(3.)
    """
    if not callable(call):
        raise TypeError(
            f"trace() was given a {type(call).__name__}; a function without arguments was needed: trace(lambda: "
            f"step(batch), path)"
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(profiler: profile) -> None:
        profiler.export_chrome_trace(str(path))
        if memory:
            _draw_memory(path)

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities, profile_memory=memory, on_trace_ready=write):
        return call()


def _draw_memory(path: Path) -> None:
    """Add a counter beside each of torch's memory events, which the viewers show as ticks without a size."""
    packed = path.name.endswith(".gz")
    text = gzip.decompress(path.read_bytes()).decode() if packed else path.read_text(encoding="utf-8")
    found = json.loads(text)
    found["traceEvents"] += [_counter(event) for event in found["traceEvents"] if event.get("name") == "[memory]"]
    text = json.dumps(found)
    if packed:
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")


def _counter(event: dict[str, Any]) -> dict[str, Any]:
    args = event["args"]
    device = "CPU" if args.get("Device Type") == 0 else f"GPU {args.get('Device Id')}"
    return {
        "ph": "C",
        "name": f"allocated on {device}",
        "pid": event["pid"],
        "ts": event["ts"],
        "args": {"bytes": args["Total Allocated"]},
    }
