"""Fitted laws and contracts: exact points are recognized, and nothing is claimed that the points do not say."""

import math

import pytest
from bilevel_profiling.records.growth import CONTRACTS, Law, Verdict, fit, slope, verdict

MIB = 2**20
STEPS = (5, 20, 50)


def points(law, steps=STEPS):
    return [(k, law(k)) for k in steps]


def kept_iterates(k):
    """What segments that shrink towards the end keep: the smallest m with m (m + 1) / 2 >= K."""
    return math.ceil((math.sqrt(8 * k + 1) - 1) / 2)


LAWS = {
    "constant": lambda k: 3 * MIB,
    "a few bytes": lambda k: 3 * MIB + 4 * k,
    "linear": lambda k: 0.68 * MIB * k + 3.1 * MIB,
    "linear, little of the whole": lambda k: 29_332 * k + 18.4 * MIB,
    "sqrt": lambda k: 2 * MIB * math.sqrt(k) + MIB,
    "sqrt in whole numbers": lambda k: 38_440 * kept_iterates(k) + 2.6 * MIB,
    "quadratic": lambda k: 1e4 * k**2 + MIB,
    "cubic": lambda k: 100.0 * k**3,
}
HELD, BROKEN, TOO_FEW, UNCLEAR = Verdict.HELD, Verdict.BROKEN, Verdict.TOO_FEW, Verdict.UNCLEAR


@pytest.mark.parametrize(
    ("name", "kind", "verdicts"),
    [
        ("constant", "constant", (HELD, HELD, HELD)),
        ("a few bytes", "constant", (HELD, HELD, HELD)),
        ("linear", "linear", (BROKEN, BROKEN, HELD)),
        ("linear, little of the whole", "linear", (BROKEN, BROKEN, HELD)),
        ("sqrt", "sqrt", (BROKEN, HELD, HELD)),
        ("sqrt in whole numbers", "sqrt", (BROKEN, HELD, HELD)),
        ("quadratic", "trend", (BROKEN, BROKEN, BROKEN)),
        ("cubic", "trend", (BROKEN, BROKEN, BROKEN)),
    ],
)
@pytest.mark.parametrize("steps", [STEPS, (4, 16, 64, 256), (10, 50, 200)])
def test_laws_are_recognized_and_contracts_are_upper_bounds(name, kind, verdicts, steps):
    law = fit(points(LAWS[name], steps))
    assert law.kind == kind
    assert tuple(verdict(contract, points(LAWS[name], steps)) for contract in CONTRACTS) == verdicts


def test_the_numbers_of_a_law_are_those_of_the_program():
    law = fit(points(LAWS["linear"]))
    assert law.per_step == pytest.approx(0.68 * MIB)
    assert law.at_zero == pytest.approx(3.1 * MIB)
    assert law.worst_residual < 1
    assert law.text == "696 KiB per inner step + 3.10 MiB"
    assert law(100) == pytest.approx(71.1 * MIB)
    root = fit(points(LAWS["sqrt"]))
    assert root(49) == pytest.approx(15 * MIB)
    assert root.text == "2.00 MiB per root of K + 1.00 MiB"
    assert fit([(1, 2.0 * MIB), (2, 5.0 * MIB), (4, 11.0 * MIB)]).text == "3.00 MiB per inner step - 1.00 MiB"


@pytest.mark.parametrize("count", [0, 1])
def test_no_law_of_fewer_than_two_k(count):
    assert fit([(5, 3.0)] * count) is None
    assert slope([(5, 3.0)] * count) is None
    assert {verdict(contract, [(5, 3.0)] * count) for contract in CONTRACTS} == {TOO_FEW}


def test_two_k_tell_only_that_nothing_grew():
    assert {verdict(contract, [(5, 100.0), (20, 100.0)]) for contract in CONTRACTS} == {HELD}
    assert {verdict(contract, [(5, 100.0), (20, 900.0)]) for contract in CONTRACTS} == {TOO_FEW}
    law = fit([(5, 100.0), (20, 400.0)])
    assert (law.kind, law.per_step) == ("trend", 20.0)
    assert "on average from K = 5 to 20" in law.text


def test_k_too_close_to_tell_a_root_in_whole_numbers_from_a_line():
    close = points(LAWS["sqrt in whole numbers"], (1, 3, 5))
    assert verdict("sqrt", close) == UNCLEAR
    assert verdict("linear", close) == HELD
    assert verdict("constant", [(30, 7.0), (31, 7.0)]) == TOO_FEW
    assert fit([(30, 7.0), (31, 7.0)]).kind == "trend"


def test_the_first_steps_may_stand_apart():
    cut = [(1, 4.0), (3, 8.0), (20, 12.0), (50, 12.0)]
    assert (fit(cut).kind, fit(cut).first) == ("constant", 20)
    assert verdict("constant", cut) == HELD
    warm = [(1, 3.0), *points(lambda k: 10.0 * k + 50, STEPS)]
    assert (fit(warm).kind, fit(warm).first, fit(warm).per_step) == ("linear", 5, pytest.approx(10.0))
    assert verdict("linear", warm) == HELD
    assert verdict("sqrt", warm) == BROKEN


def test_bending_upwards_without_being_superlinear_is_not_called_broken():
    """The larger of a constant and a line, as where the work space is larger than the tape at small K."""
    knee = points(lambda k: max(100.0, 5.0 * k), (5, 25, 50))
    assert verdict("linear", knee) == UNCLEAR
    assert verdict("constant", knee) == BROKEN


def test_falling_memory_keeps_every_contract():
    assert {verdict(contract, [(5, 9.0), (20, 5.0), (50, 4.0)]) for contract in CONTRACTS} == {HELD}
    assert fit([(5, 9.0), (20, 5.0), (50, 4.0)]).kind == "trend"


def test_order_repetition_and_holes_do_not_matter():
    mixed = [(50, 53.0), (5, 8.0), (20, math.nan), (20, 22.0), (20, 23.0)]
    assert fit(mixed) == fit([(5, 8.0), (20, 23.0), (50, 53.0)])
    assert fit([(0, 0.0), (5, 0.0)]).text == "constant, 0 B"
    assert fit([(1, 1e12), (10, 1e13), (100, 1e14)]).text == "931 GiB per inner step + 0 B"


def test_an_unknown_contract_is_told():
    with pytest.raises(ValueError, match="'cubic'; constant, sqrt or linear"):
        verdict("cubic", points(LAWS["linear"]))


def test_laws_are_plain_values():
    assert fit(points(LAWS["constant"])) == Law("constant", 0.0, 3.0 * MIB, 0.0, 5, 50)
