"""What the numbers of one case say, in sentences computed from its records."""

import dataclasses

from bilevel_profiling.records import units
from bilevel_profiling.report.content.footnotes import QUANTILES
from bilevel_profiling.report.content.groups import EXACT, MEASURED, Group
from bilevel_profiling.report.content.laws import law
from bilevel_profiling.report.content.text import listing, plural

PLAIN_TITLE = "Memory and time, measured"
"""Of a report on runs that are no hypergradients."""


class Name(str):
    """Text from a record inside a sentence (a label, a status): views set it apart, and clean it."""


Sentence = list[str]
"""Fragments to be joined without separators; those that are not `Name` are safe anywhere."""


@dataclasses.dataclass(frozen=True)
class Fact:
    """One figure worth a large print."""

    title: str
    value: str
    estimator: str
    detail: str


def sentences(group: Group) -> list[Sentence]:
    """The paragraph on a case."""
    found = [
        _all_computed(group),
        _lightest(group),
        _exact(group),
        _growing(group),
        _failing(group),
        _leaking(group),
        _some_computed(group),
    ]
    return [sentence for sentence in found if sentence]


def facts(group: Group) -> list[Fact]:
    """Least memory, the lightest and the fastest exact estimator, and the most memory, where they are known."""
    k, field = group.focus, group.measure.field
    if len(group.estimators) == 1:
        return _alone(group, group.estimators[0])
    memory, times = _values(group, field), _values(group, "wall_seconds")
    exact = {e for e in group.estimators if group.exact(e, k)}
    found = []
    for title, candidates, choose in (
        ("Least memory", memory, min),
        ("Lightest exact", {e: v for e, v in memory.items() if e in exact}, min),
        ("Most memory", memory, max),
    ):
        if candidates:
            label = choose(candidates, key=lambda e: candidates[e])
            found.append(Fact(title, units.size(candidates[label]), label, _error_text(group, label)))
    fast = {e: v for e, v in times.items() if e in exact}
    if fast:
        label, rivals = _fastest(group, fast)
        doubt = (
            f"not told apart from {listing(rivals)}: their {QUANTILES} ranges overlap"
            if rivals
            else _error_text(group, label)
        )
        found.insert(2, Fact("Fastest exact", units.duration(fast[label]), label, doubt))
    return found


def _alone(group: Group, label: str) -> list[Fact]:
    found = []
    for title, field, write in (
        (group.measure.name, group.measure.field, units.size),
        ("time", "wall_seconds", units.duration),
    ):
        if (value := group.value(label, group.focus, field)) is not None:
            found.append(Fact(f"{title[0].upper()}{title[1:]}", write(value), label, at(group)))
    return found


def at(group: Group) -> str:
    """The K of the sentences and facts, as in "K = 20"; nothing where K is unknown."""
    return "" if group.focus is None else f"K = {group.focus:,}"


def _values(group: Group, field: str) -> dict[str, float]:
    pairs = ((label, group.value(label, group.focus, field)) for label in group.estimators)
    return {label: value for label, value in pairs if value is not None}


def _error_text(group: Group, label: str) -> str:
    error = group.value(label, group.focus, "program_relative_error")
    return "" if error is None else f"relative error {units.significant(error)}"


def _lightest(group: Group) -> Sentence:
    memory = _values(group, group.measure.field)
    start = f"At {at(group)}, " if at(group) else ""
    if not memory and not group.bilevel and not group.failures:
        return [f"{plural(sum(len(record.iterations) for record in group.records), 'step')} recorded."]
    if not memory:
        return ["No run finished with its memory measured."]
    label = min(memory, key=lambda e: memory[e])
    if len(group.estimators) == 1:
        return [start, Name(label or group.case), f" needs {units.size(memory[label])} ({group.measure.name})."]
    sentence: Sentence = [start, Name(label), f" needs the least memory: {units.size(memory[label])}"]
    base = group.baseline
    if base in memory and base != label and memory[label] > 0:
        sentence += [
            f", against {units.size(memory[base])} for ",
            Name(base),
            f" ({units.ratio(memory[label] / memory[base])})",
        ]
    program = group.value(label, group.focus, "program_relative_error")
    solution = group.value(label, group.focus, "solution_relative_error")
    errors = []
    if program is not None:
        errors.append(f"{units.significant(program)} against the K-step program")
    if solution is not None:
        errors.append(f"{units.significant(solution)} against the converged solution")
    return [*sentence, f"; its relative error is {listing(errors)}." if errors else "."]


def _exact(group: Group) -> Sentence:
    k = group.focus
    errors = _values(group, "program_relative_error")
    if not errors and group.focus is None:
        return []
    if not errors:
        return ["Errors against the K-step program were not measured."]
    exact = [label for label in errors if errors[label] <= EXACT]
    if not exact:
        label = min(errors, key=lambda e: errors[e])
        return [
            f"No estimator reproduces the gradient of the K-step program to {EXACT:g}; the closest is ",
            Name(label),
            f" ({units.significant(errors[label])}).",
        ]
    verb = "reproduces" if len(exact) == 1 else "reproduce"
    sentence: Sentence = [
        *_names(exact),
        f" {verb} the gradient of the K-step program (relative error at most {EXACT:g})",
    ]
    memory = {e: v for e in exact if (v := group.value(e, k, group.measure.field)) is not None}
    times = {e: v for e in exact if (v := group.value(e, k, "wall_seconds")) is not None}
    if len(exact) == 1 or not memory:
        return [*sentence, "."]
    light = min(memory, key=lambda e: memory[e])
    sentence += ["; of these, ", Name(light), f" is the lightest ({units.size(memory[light])}"]
    if light in times:
        sentence.append(f", {units.duration(times[light])}")
    sentence.append(")")
    if not times:
        return [*sentence, "."]
    fast, rivals = _fastest(group, times)
    if rivals:
        return [
            *sentence,
            f"; which is the fastest cannot be told, the times ({QUANTILES}) of ",
            *_names([fast, *rivals]),
            " overlap.",
        ]
    rest = f"{units.duration(times[fast])}" + (f", {units.size(memory[fast])}" if fast in memory else "")
    return [*sentence, *([" and the fastest."] if fast == light else [" and ", Name(fast), f" the fastest ({rest})."])]


def _fastest(group: Group, times: dict[str, float]) -> tuple[str, list[str]]:
    """The estimator with the shortest median time, and those whose [low, high] reaches into its own."""
    label = min(times, key=lambda e: times[e])
    edge = _bound(group, label, "wall_seconds_high", times[label])
    return label, [e for e in times if e != label and _bound(group, e, "wall_seconds_low", times[e]) <= edge]


def _bound(group: Group, label: str, field: str, time: float) -> float:
    found = group.value(label, group.focus, field)
    return time if found is None else found


def _all_computed(group: Group) -> Sentence:
    if any(record.source == MEASURED for record in group.records):
        return []
    return ["All of these figures are from a ", Name(group.records[0].source), ": the case was not run."]


def _some_computed(group: Group) -> Sentence:
    kinds = dict.fromkeys(record.source for record in group.records if record.source != MEASURED)
    if not kinds or all(record.source != MEASURED for record in group.records):
        return []
    return ["Rows that say ", *_names(list(kinds)), " were computed without running the case."]


def _growing(group: Group) -> Sentence:
    found = {label: fitted for label in group.estimators if (fitted := law(group, label)) is not None}
    flat = [label for label, fitted in found.items() if fitted.kind == "constant"]
    rising = {label: fitted for label, fitted in found.items() if fitted.kind == "linear"}
    sentence: Sentence = []
    if rising:
        label = max(rising, key=lambda e: rising[e].per_step)
        sentence += ["Each inner step adds ", units.size(rising[label].per_step), " to ", Name(label)]
    if flat:
        sentence += [
            "; " if rising else "",
            "the memory of " if rising else "The memory of ",
            *_names(flat),
            " does not grow with K",
        ]
    return [*sentence, "."] if sentence else []


def _failing(group: Group) -> Sentence:
    if not group.failures:
        return []
    sentence: Sentence = [f"{len(group.failures):,} of {plural(len(group.records), 'run')} failed: "]
    statuses = [r.status for r in group.failures]
    for place, status in enumerate(dict.fromkeys(statuses)):
        sentence += [", " if place else "", Name(status), f" ({statuses.count(status):,})"]
    return [*sentence, "."]


def _leaking(group: Group) -> Sentence:
    leaks = {
        r.estimator: r.kept_tensor_bytes for r in group.rows if r.kept_tensor_bytes and r.status != "OUT_OF_MEMORY"
    }
    if not leaks:
        return []
    label = max(leaks, key=lambda e: leaks[e])
    return [Name(label), f" still held {units.size(leaks[label])} after its result was dropped: something leaks."]


def _names(labels: list[str]) -> Sentence:
    """Labels as an enumeration; of many, the first few."""
    if len(labels) > 6:
        return [*(part for label in labels[:4] for part in (Name(label), ", ")), f"and {len(labels) - 4:,} others"]
    parts: Sentence = []
    for place, label in enumerate(labels):
        parts += [] if place == 0 else [" and " if place == len(labels) - 1 else ", "]
        parts.append(Name(label))
    return parts
