"""What is wanted of benchmarks/engine.py, and its table in Markdown."""

WANTED = {  # (cell, the beginning of the variant): (time ratio, memory ratio, bytes), each None where nothing is wanted
    ("P2", 50, "compiled"): (1.15, 0.25, None),
    ("P2", 200, "compiled"): (1.15, 0.12, None),
    ("P1", 10, "compiled"): (1.1, 0.1, None),
    ("P1", 50, "compiled"): (1.1, 0.03, None),
    ("P3", 8, "compiled"): (1.1, 0.15, None),
    ("P3", 8, "rematerialized"): (None, 0.1, None),
    ("P3", 8, "compiled, rematerialized"): (None, 0.1, None),
    ("hvp", 8, "rematerialized"): (1.4, None, 45e6),
    ("hvp", 8, "compiled, rematerialized"): (1.4, None, 45e6),
    ("hvp", 16, "rematerialized"): (1.4, None, None),
    ("cg", 10, "compiled"): (0.7, None, 6e6),
    ("cg", 50, "compiled"): (0.7, None, 6e6),
}


def wanted(work, size, label):
    """The wanted numbers of a variant: those of the longest beginning that fits."""
    fits = [key for key in WANTED if key[:2] == (work, size) and label.startswith(key[2])]
    return WANTED[max(fits, key=lambda key: len(key[2]))] if fits else None


def reached(record):
    """Whether a row is within what is wanted of it; None where nothing is."""
    bounds = wanted(record["work"], record["size"], record["variant"])
    if bounds is None or "seconds" not in record:
        return None
    found = record["time_ratio"], record["memory_ratio"], record["peak_bytes"]
    return all(bound is None or value <= bound for bound, value in zip(bounds, found, strict=True))


def family(work, size):
    """Cells that have one name here run the same compiled functions."""
    return work if work in ("P1", "P2", "P3", "cg") else f"{work}-{size}"


def table(records, costs):
    """Markdown: time and memory of every variant, over those of the first of its cell."""
    names = {"hvp": "one product, {} blocks", "cg": "implicit, CG(10), P2, K = {}"}
    lines = [
        "| work | variant | ms | t | MB (other meter) | m | once, s | error | wanted |",
        "| --- " * 9 + "|",
    ]
    for r in records:
        work = names.get(r["work"], r["work"] + ", K = {}").format(r["size"])
        if "error" in r:
            lines.append(f"| {work} | {r['variant']} | fails " + "| " * 6 + "|")
            continue
        cost = costs.get(family(r["work"], r["size"]), {})
        cold, warm = (cost.get(kind, {}).get(r["variant"], {}) for kind in ("cold", "warm"))
        other, error = r.get("peak_bytes_dispatched"), r["error_float64"] or r["difference"]
        once = f"{cold['trace_seconds']:.0f} + {cold['compile_seconds']:.0f}" if "trace_seconds" in cold else ""
        once += f" ({warm['compile_seconds']:.0f})" if once and "compile_seconds" in warm else ""
        bounds, met = wanted(r["work"], r["size"], r["variant"]), reached(r)
        lines.append(
            f"| {work} | {r['variant']} | {r['seconds'] * 1e3:,.0f} | {r['time_ratio']:.2f} "
            f"| {r['peak_bytes'] / 1e6:.1f}{f' ({other / 1e6:.1f})' if other else ''} | {r['memory_ratio']:.3f} "
            f"| {once} | {_error(error)} | {'' if bounds is None else _bounds(bounds) + (': yes' if met else ': no')} |"
        )
    lines += profiles(records, names)
    places = dict.fromkeys(", ".join(f"{k} {v}" for k, v in r["environment"].items() if k != "date") for r in records)
    days = sorted({r["environment"]["date"][:10] for r in records})
    rounds = sorted({r["rounds"] for r in records if "rounds" in r})
    lines += [
        "",
        f"Made by `python benchmarks/engine.py`: one core and one thread, process CPU time, medians over {rounds[0]} "
        f"to {rounds[-1]} rounds that visit every variant of a cell in turn; t and m are divided by the first variant "
        "of the cell. MB: the peak of the allocator's events above the start; in brackets what the dispatch mode of "
        "the bench folder sees of live tensors. Once, s: wall time of tracing + compiling what a variant makes new "
        "(what an earlier row of the work has made is shared), in brackets compiling in a second process, from torch's "
        "cache. Error: relative, to a float64 reference, of one product to the first variant. jaxopt and BOAT are not "
        "installed beside this torch and are left out; Betty 0.2.1 cannot unroll (its IterativeProblem fails). Of CG, "
        "all solve "
        "the damped system, in ten products.",
        "",
        f"{'; '.join(places)}; {' to '.join(dict.fromkeys([days[0], days[-1]]))}.",
    ]
    return "\n".join(lines) + "\n"


def profiles(records, names):
    """Where the time goes, of cells with a wanted number that no variant reached."""
    shown = [r for r in records if r.get("profile_milliseconds")]
    if not shown:
        return []
    groups = list(shown[0]["profile_milliseconds"])
    lines = ["", "Where a wanted number is not reached, where the time goes, in ms under torch's profiler:", ""]
    lines += ["| work | variant | " + " | ".join(groups) + " |", "| --- " * (2 + len(groups)) + "|"]
    for r in shown:
        work = names.get(r["work"], r["work"] + ", K = {}").format(r["size"])
        values = " | ".join(f"{value:,.0f}" for value in r["profile_milliseconds"].values())
        lines.append(f"| {work} | {r['variant']} | {values} |")
    return lines


def _error(value):
    return "" if value in (0, None) else f"{value:.0e}"


def _bounds(bounds):
    named = zip(("t", "m", "MB"), (bounds[0], bounds[1], bounds[2] and bounds[2] / 1e6), strict=True)
    return ", ".join(f"{value:g} {name}" for name, value in named if value is not None)
