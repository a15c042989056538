"""`bilevel list`: what there is to compare."""

import argparse

from bilevel_profiling.cli import options as types
from bilevel_profiling.cli.output import DONE


def add(verbs: "types.Verbs") -> argparse.ArgumentParser:
    """Say what it takes: nothing."""
    return verbs.add_parser(
        "list",
        help="list what there is to compare",
        description="List the built-in cases, the estimators and solvers of the library, and other libraries whose "
        "methods can be compared with them.",
    )


def run(options: argparse.Namespace) -> int:
    """Do it."""
    import bilevel as bl
    from bilevel_profiling.baselines.packages import titles
    from bilevel_profiling.cases.case_file import builtin_titles
    from bilevel_profiling.meters.devices import DEVICES
    from bilevel_profiling.records import sizes

    kinds = {
        "estimators": bl.Estimator,
        "engines": bl.Engine,
        "inner solvers": bl.InnerSolver,
        "inner optimizers": bl.Optimizer,
        "linear solvers": bl.LinearSolver,
    }
    parts: dict[str, dict[str, str]] = {"cases": builtin_titles()}
    for title, kind in kinds.items():
        found = {
            name: value
            for name, value in vars(bl).items()
            if isinstance(value, type) and issubclass(value, kind) and value is not kind
        }
        parts[title] = {name: (value.__doc__ or "").strip().partition("\n")[0] for name, value in sorted(found.items())}
    parts["baselines for --baselines"] = titles()
    parts["devices for --on"] = {
        name: f"{device.name}: {device.flops['float32'] / 1e12:g} TFLOP/s float32, "
        f"{device.bandwidth / 1e9:,.0f} GB/s, {sizes.text(device.memory)}"
        for name, device in DEVICES.items()
    }
    width = max(len(name) for members in parts.values() for name in members)
    for title, members in parts.items():
        print(f"{title}:")
        for name, line in members.items():
            print(f"  {name:<{width}}  {line}")
    return DONE
