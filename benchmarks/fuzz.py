"""Thousands of random draws against the hand-written oracle of tests/bilevel/fuzzing.py.

    python benchmarks/fuzz.py --draws 5000 --seed 0
    python benchmarks/fuzz.py --seed 0 --only 123          # one draw again, with its whole story

Exits with 1 if anything was found. Each kind of finding is printed once with the simplest draw that shows it, as a
program, and then by its other indices.
"""

import argparse
import collections
import re
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "bilevel")]

import fuzzing  # noqa: E402
import torch  # noqa: E402

FAMILIES = dict.fromkeys(fuzzing.UNROLLED, "Unrolled")


def one(choices):
    """A draw checked; an error of the oracle itself is a finding too."""
    try:
        return fuzzing.check(choices)
    except Exception:
        return fuzzing.Checked(choices, "oracle", [fuzzing.Finding("oracle broke", traceback.format_exc(limit=-2))])


def rough(choices, finding):
    """What probably is one defect: the estimator's family, the kind, the beginning of the text without its numbers."""
    words = re.sub(r"[-\d.e\[\]{}', ]+", " ", finding.text.split(";")[0])[:40]
    if finding.kind == "wrong number":
        traits = ("optimizer", "decay", "heads", "f_only", "converge", "solved", "random")
        plain = fuzzing.Choices()
        words += " ".join(f"{t}={getattr(choices, t)}" for t in traits if getattr(choices, t) != getattr(plain, t))
    return FAMILIES.get(choices.estimator, choices.estimator), finding.kind, words


def report(groups, simplify):
    """Each group once."""
    print()
    for number, ((family, kind, _), members) in enumerate(sorted(groups.items(), key=lambda item: -len(item[1]))):
        _, choices, finding = members[0]
        print(f"{family}: {kind} ({len(members)} draws: {', '.join(str(i) for i, *_ in members[:8])})")
        if number < simplify and kind != "oracle broke":
            choices = fuzzing.simplified(choices, kind)
            finding = next(each for each in fuzzing.check(choices).findings if each.kind == kind)
        print(f"    {finding.text[:600]}")
        print(f"    import fuzzing; print(fuzzing.check(fuzzing.{choices.brief()}).findings)\n", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="the first index")
    parser.add_argument("--only", type=int, help="one index")
    parser.add_argument("--simplify", type=int, default=20, help="how many kinds of findings to simplify")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.only is not None:
        found = one(fuzzing.choose(options.seed, options.only))
        print(f"fuzzing.{found.choices.brief()}\n{found.outcome}, compared to {found.digits:.1f} digits")
        print("\n".join(f"{each.kind}: {each.text}" for each in found.findings))
        return 1 if found.findings else 0
    outcomes, groups, began = collections.Counter(), collections.defaultdict(list), time.monotonic()
    wrong = 0
    for count, index in enumerate(range(options.start, options.start + options.draws), 1):
        found = one(fuzzing.choose(options.seed, index))
        outcomes[found.outcome] += 1
        wrong += bool(found.findings)
        for finding in found.findings:
            groups[rough(found.choices, finding)].append((index, found.choices, finding))
        if count % 50 == 0 or count == options.draws:
            said = ", ".join(f"{n} {name}" for name, n in outcomes.most_common())
            print(
                f"{count} of {options.draws} draws, {time.monotonic() - began:.0f} s: {wrong} wrong; {said}", flush=True
            )
    report(groups, options.simplify)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
