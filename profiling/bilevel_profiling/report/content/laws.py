"""Memory and time against K as laws, and the contracts that they are held against."""

from bilevel_profiling.records import units
from bilevel_profiling.records.growth import Law, Verdict, fit, slope, verdict
from bilevel_profiling.report.content.groups import Group
from bilevel_profiling.report.content.text import clean

GROWTH = (
    "Growth with K is a law that the measured points follow: constant, a line (to 2 percent of the growth), or the "
    "root of K (to 5 percent, as whole iterates are kept). Two K tell neither. "
    "A contract is an upper bound that the estimator promises; memory that does not grow keeps every one."
)
_HELD_AGAINST = ("peak_tensor_bytes", "cuda_allocated_bytes")
"""Resident memory is no measure of what an estimator promised."""


def law(group: Group, estimator: str) -> Law | None:
    """The law that the estimator's memory follows; None with fewer than two K."""
    return fit(group.points(estimator, group.measure.field))


def contract(group: Group, estimator: str) -> str:
    """What the estimator's records promise, "" for nothing."""
    return next((r.memory_growth for r in group.records if r.estimator == estimator and r.memory_growth), "")


def judged(group: Group, estimator: str) -> Verdict | None:
    """What the measured memory says about the contract; None without one."""
    promised = contract(group, estimator)
    if promised not in ("constant", "sqrt", "linear") or group.measure.field not in _HELD_AGAINST:
        return None
    return verdict(promised, group.points(estimator, group.measure.field))


def broken(group: Group) -> list[tuple[str, str]]:
    """(label, rest of a sentence) of every estimator that broke its contract."""
    found = []
    for label in group.estimators:
        if judged(group, label) is Verdict.BROKEN and (measured := law(group, label)):
            how = {"sqrt": "growth with the root of K at most"}.get(
                contract(group, label), f"{contract(group, label)} growth at most"
            )
            how = "no growth with K" if contract(group, label) == "constant" else how
            found.append((label, f"promises {how}; its {group.measure.name} is {measured.said(units.size)}."))
    return found


def table(group: Group) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the laws; no rows where there is one K only."""
    rows = []
    for label in group.estimators:
        found, said = law(group, label), judged(group, label)
        if found is None:
            continue
        pace = slope(group.points(label, "wall_seconds"))
        told = units.MISSING if said is None else said.value.upper() if said is Verdict.BROKEN else said.value
        holds = "no law" if found.kind == "trend" else f"K = {found.first:,} to {found.last:,}"
        off = units.MISSING if found.kind == "trend" else units.size(found.worst_residual)
        promised = clean(contract(group, label)) or units.MISSING
        rows.append([clean(label), promised, told, found.said(units.size), holds, off, units.milliseconds(pace)])
    return [
        "estimator",
        "contract",
        "verdict",
        group.measure.name,
        "holds for",
        "off by at most",
        "ms per inner step",
    ], rows
