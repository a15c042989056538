"""The pytest plugin, in runs of pytest of its own."""

import json
import os
import sys

import pytest
import torch
from bilevel_profiling.records.record import Alive
from bilevel_profiling.testing.contract import Growth, above, contract
from bilevel_profiling.testing.pytest_plugin import PeakMemory

pytest_plugins = ["pytester"]

PLUGIN = "bilevel_profiling.testing.pytest_plugin"
# Runs in this process forget the modules they imported; torch's compiler, which a dispatch mode loads, cannot be
# imported twice.
PeakMemory().of(lambda: torch.ones(1))
KIB = 256  # float32 numbers


@pytest.fixture
def run(pytester, monkeypatch):
    """Runs pytest with the plugin on a test file."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    pytester.makeini("[pytest]\naddopts = --strict-markers\nfilterwarnings = error")

    def run(source, *arguments, subprocess=False):
        pytester.makepyfile(test_it="import pytest\nimport torch\n\n" + source)
        runner = pytester.runpytest_subprocess if subprocess else pytester.runpytest_inprocess
        return runner("-p", PLUGIN, *arguments)

    return run


def test_a_peak_below_the_limit_passes_and_one_above_fails(run):
    result = run("""
@pytest.mark.peak_memory(max_bytes="4 KiB")
def test_fits():
    torch.ones(1024)

@pytest.mark.peak_memory(max_bytes=4 * 1024 - 1)
def test_just_not():
    torch.ones(1024)

@pytest.mark.peak_memory(max_bytes="1 MiB")
def test_leaks():
    kept = []
    for _ in range(300):
        kept.append(torch.ones(1024).exp())

def test_unmarked():
    torch.ones(10_000_000)
""")
    result.assert_outcomes(passed=2, failed=2)
    result.stdout.fnmatch_lines(
        [
            "_* test_just_not _*",
            "peak memory is 4,096 B, above max_bytes = 4,095 B",
            "alive at the peak:",
            "  4.00 KiB  aten.ones  *test_it.py:11",
            "_* test_leaks _*",
            "peak memory is 1.18 MiB, above max_bytes = 1.00 MiB",
            "  1.1? MiB  300 x aten.exp  *test_it.py:17",
        ]
    )


def test_what_fixtures_make_does_not_count(run):
    run("""
@pytest.fixture
def data():
    yield torch.ones(100_000)
    torch.ones(100_000)

@pytest.mark.peak_memory(max_bytes="1 KiB")
def test_it(data):
    data[:256] + 1
""").assert_outcomes(passed=1)


def test_a_test_that_fails_by_itself_says_why_and_is_not_judged(run):
    result = run("""
@pytest.mark.peak_memory(max_bytes=1)
def test_fails():
    torch.ones(1024)
    assert 1 == 2

@pytest.mark.peak_memory(max_bytes=1)
def test_skips():
    torch.ones(1024)
    pytest.skip("not today")

@pytest.mark.peak_memory(max_bytes=1)
@pytest.mark.xfail(strict=True)
def test_known():
    torch.ones(1024)
""")
    result.assert_outcomes(failed=1, skipped=1, xfailed=1)
    result.stdout.fnmatch_lines(["*assert 1 == 2*"])
    result.stdout.no_fnmatch_line("*above max_bytes*")


def test_marks_of_a_class_hold_until_a_nearer_one(run):
    run("""
@pytest.mark.peak_memory(max_bytes="1 KiB")
class TestAll:
    def test_small(self):
        torch.ones(256)

    def test_large(self):
        torch.ones(257)

    @pytest.mark.peak_memory(max_bytes="2 KiB")
    def test_large_with_leave(self):
        torch.ones(512)
""").assert_outcomes(passed=2, failed=1)


GROWING = """
@pytest.mark.peak_memory(flat_in="inner_steps")
@pytest.mark.parametrize("inner_steps", [5, 50, 20])
def test_memory(inner_steps):
    kept = [torch.ones(256) for _ in range(inner_steps)]

@pytest.mark.peak_memory(flat_in="inner_steps")
@pytest.mark.parametrize("inner_steps", [5, 50])
def test_flat(inner_steps):
    for _ in range(inner_steps):
        torch.ones(256)
"""


@pytest.mark.parametrize("verbose", [(), ("-v",), ("-q",)], ids=str)
def test_memory_that_grows_with_a_parameter_is_a_failure_with_its_values(run, verbose):
    result = run(GROWING, *verbose)
    result.assert_outcomes(passed=5, failed=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        [
            "peak memory grows with inner_steps: 5: 5.00 KiB, 20: 20.0 KiB, 50: 50.0 KiB (1.00 KiB per inner_steps); "
            "flat_in allows no difference"
        ]
    )
    result.stdout.fnmatch_lines(["FAILED test_it.py::test_memory[[]flat_in=inner_steps[]]*"])
    result.stdout.no_fnmatch_line("*not judged*")
    assert "[120%]" not in result.stdout.str()


def test_tolerance_is_the_difference_that_is_allowed(run):
    source = """
@pytest.mark.peak_memory(flat_in="steps", tolerance={})
@pytest.mark.parametrize("steps", [5, 50])
def test_memory(steps):
    torch.ones(256 + steps)
"""
    run(source.format(180)).assert_outcomes(passed=2)
    result = run(source.format(179))
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(
        [
            "peak memory grows with steps: 5: 1.02 KiB, 50: 1.20 KiB (4 B per steps); "
            "flat_in allows a difference of 179 B"
        ]
    )


def test_a_slope_can_be_limited_instead(run):
    source = """
@pytest.mark.peak_memory(max_slope={{"steps": "{}"}})
@pytest.mark.parametrize("steps", [5, 50, 100])
def test_memory(steps):
    kept = [torch.ones(256) for _ in range(steps)]
"""
    run(source.format("1 KiB")).assert_outcomes(passed=3)
    result = run(source.format("1000 B"))
    result.assert_outcomes(passed=3, failed=1)
    result.stdout.fnmatch_lines(
        ["peak memory grows by 1.00 KiB per steps between 5 and 50: 5: 5.00 KiB, *; max_slope allows 1000 B"]
    )


def test_other_parameters_make_groups_of_their_own(run):
    result = run("""
@pytest.mark.peak_memory(flat_in="steps")
@pytest.mark.parametrize("width", [256, 512])
@pytest.mark.parametrize("steps", [5, 50])
def test_memory(steps, width):
    torch.ones(width + (steps if width == 512 else 0))
""")
    result.assert_outcomes(passed=4, failed=1)
    result.stdout.fnmatch_lines(["FAILED test_it.py::test_memory[[]flat_in=steps, width=512[]] - *"])


def test_objects_as_other_parameters_are_told_apart(run):
    result = run("""
class Net:
    pass

@pytest.mark.peak_memory(flat_in="steps")
@pytest.mark.parametrize("net", [Net(), Net(), torch.sin, torch.cos])
@pytest.mark.parametrize("steps", [5, 50])
def test_memory(steps, net):
    torch.ones(steps if isinstance(net, Net) else 5)
""")
    result.assert_outcomes(passed=8, failed=2)
    result.stdout.fnmatch_lines([f"FAILED test_it.py::test_memory[[]flat_in=steps, net=net{n}[]] - *" for n in (0, 1)])


def test_values_that_are_no_numbers_are_compared_too(run):
    result = run("""
@pytest.mark.peak_memory(flat_in="dtype")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory(dtype):
    torch.ones(256, dtype=dtype)
""")
    result.assert_outcomes(passed=2, failed=1)
    result.stdout.fnmatch_lines(
        [
            "peak memory changes with dtype: torch.float32: 1.00 KiB, torch.float64: 2.00 KiB; "
            "flat_in allows no difference"
        ]
    )


@pytest.mark.parametrize("selection", [("-k", "50"), ("test_it.py::test_memory[50]",)], ids=["-k", "by name"])
def test_one_value_alone_is_not_judged_and_that_is_said(run, selection):
    result = run(GROWING.partition("def test_flat")[0].rpartition("@pytest.mark.peak")[0], *selection)
    result.assert_outcomes(passed=1, deselected=2 if selection[0] == "-k" else 0)
    assert result.ret == 0
    result.stdout.fnmatch_lines(
        ["*peak memory: not judged*", "*only inner_steps=50 (50.0 KiB) was measured; two values are needed*"]
    )


def test_values_whose_test_failed_are_left_out(run):
    result = run("""
@pytest.mark.peak_memory(flat_in="steps")
@pytest.mark.parametrize("steps", [5, 50, 100])
def test_memory(steps):
    kept = torch.ones(256 * steps)
    assert steps < 100

@pytest.mark.peak_memory(flat_in="steps")
@pytest.mark.parametrize("steps", [5, 50])
def test_half(steps):
    assert steps < 10
""")
    result.assert_outcomes(passed=3, failed=3)
    result.stdout.fnmatch_lines(["peak memory grows with steps: 5: 5.00 KiB, 50: 50.0 KiB (*"])
    result.stdout.fnmatch_lines(["*test_half*only steps=5 (0 B) was measured*"])


def test_a_run_that_stops_early_does_not_judge(run):
    result = run(GROWING + "\ndef test_last():\n    raise KeyError\n\ndef test_never():\n    pass\n", "-x")
    result.assert_outcomes(passed=5, failed=1)
    result.stdout.fnmatch_lines(
        ["*peak memory: not judged*", "*was measured; the run was stopped before the last test*"]
    )


def test_the_failure_is_in_the_junit_file_and_forgotten_by_lf_once_it_is_gone(run, pytester):
    run(GROWING, "--junitxml=out.xml", "-p", "cacheprovider")
    text = (pytester.path / "out.xml").read_text()
    assert 'name="test_memory[flat_in=inner_steps]"' in text
    assert '<property name="peak_tensor_bytes" value="51200"' in text
    failed = pytester.path / ".pytest_cache" / "v" / "cache" / "lastfailed"
    assert json.loads(failed.read_text()) == {"test_it.py::test_memory[flat_in=inner_steps]": True}
    run(GROWING, "--lf").assert_outcomes(passed=5, failed=1)  # all values, so that it can be judged
    run(GROWING.replace("kept = [torch.ones(256) for", "[None for")).assert_outcomes(passed=5)
    assert not failed.exists() or json.loads(failed.read_text()) == {}


WRONG = {
    '"10 MiB"': "was given '10 MiB'; it takes max_bytes=, flat_in=, tolerance=, max_slope= by name",
    'max_byte="10 MiB"': "was given max_byte;",
    "": "asks for nothing; write max_bytes=",
    'max_bytes="ten"': "was given max_bytes='ten': 'ten' is no size",
    "max_bytes=0": "was given max_bytes=0: ",
    "max_bytes=1, tolerance=3": "was given tolerance, which belongs to flat_in",
    'flat_in="steps"': "was given flat_in='steps', but the test is parametrized only over width; "
    "write @pytest.mark.parametrize('steps',",
    'max_slope="1 MiB"': "was given max_slope='1 MiB'; a dict was needed",
    'max_slope={"width": "1 MiB"}': "was given max_slope for width, whose value here is 'wide'; numbers were needed",
    'flat_in="width", tolerance="x"': "was given tolerance='x': ",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_a_wrong_mark_is_a_usage_error_that_names_the_test(run, arguments):
    result = run(f"""
@pytest.mark.peak_memory({arguments})
@pytest.mark.parametrize("width", ["wide"])
def test_it(width):
    pass
""")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: test_it.py::test_it[[]wide[]]: the mark peak_memory {WRONG[arguments]}*"])


def test_unittest_is_refused(run):
    result = run("""
import unittest

class TestIt(unittest.TestCase):
    @pytest.mark.peak_memory(max_bytes=1)
    def test_it(self):
        pass
""")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: test_it.py::TestIt::test_it: the mark peak_memory works on test functions*"])


def test_the_fixture_measures_parts(run):
    result = run("""
def test_parts(peak_memory):
    torch.ones(1_000_000)
    with peak_memory(max_bytes="1 KiB") as meter:
        torch.ones(256)
    assert meter.peak_bytes == 1024
    assert peak_memory.of(lambda: torch.ones(256) + 1) == 2048
    with peak_memory() as free:
        torch.ones(1_000_000)
    assert free.peak_bytes == 4_000_000

def test_too_much(peak_memory):
    with peak_memory(max_bytes="1 KiB"):
        torch.ones(257)

def test_raises(peak_memory):
    with pytest.raises(KeyError):
        with peak_memory(max_bytes=1):
            torch.ones(257)
            raise KeyError

def test_wrong(peak_memory):
    with pytest.raises(ValueError, match="no size"):
        peak_memory(max_bytes="much")

@pytest.mark.peak_memory(max_bytes="3 KiB")
def test_both(peak_memory):
    kept = torch.ones(512)
    assert peak_memory.of(lambda: torch.ones(256)) == 1024
""")
    result.assert_outcomes(passed=4, failed=1)
    result.stdout.fnmatch_lines(
        [">*with peak_memory(max_bytes=*", "E*Failed: peak memory is 1,028 B, above max_bytes = 1,024 B"]
    )
    result.stdout.no_fnmatch_line("*pytest_plugin.py*")


def test_the_plugin_alone_imports_no_torch(pytester):
    code = f"import sys, {PLUGIN}; print(sorted({{'torch', 'bilevel', 'numpy'}} & set(sys.modules)))"
    path = os.pathsep.join(filter(None, sys.path))
    pytester.makepyfile(run=f"import sys\nsys.path[:0] = {path!r}.split({os.pathsep!r})\n{code}")
    assert pytester.runpython("run.py").stdout.lines == ["[]"]


def test_marks_are_shown_by_pytest_markers(run):
    result = run("", "--markers")
    result.stdout.fnmatch_lines(
        ["@pytest.mark.peak_memory(max_bytes=..., flat_in=..., tolerance=..., max_slope=...): limits *"]
    )


def test_it_works_across_processes(run):
    pytest.importorskip("xdist")
    wrong = "\n@pytest.mark.peak_memory(flat_in='K')\ndef test_wrong():\n    pass\n"
    result = run(GROWING + wrong, "-p", "xdist.plugin", "-n", "2", subprocess=True)
    result.assert_outcomes(passed=5, failed=1, errors=1)
    result.stdout.fnmatch_lines(
        ["peak memory grows with inner_steps: 5: 5.00 KiB, 20: 20.0 KiB, 50: 50.0 KiB (1.00 KiB per inner_steps)*"]
    )
    result.stdout.fnmatch_lines(["test_it.py::test_wrong: the mark peak_memory was given flat_in='K', but *"])


# The judgement alone


def test_peaks_that_fall_and_rise_change_and_do_not_grow():
    assert (
        Growth("K", tolerance=0)
        .broken_by([(5, 2048), (50, 1024), (20, 4096)])
        .startswith("peak memory changes with K: 5: 2.00 KiB, 20: 4.00 KiB,")
    )
    assert Growth("K", tolerance=3072).broken_by([(5, 2048), (50, 1024), (20, 4096)]) == ""


def test_the_steepest_stretch_counts_for_a_slope():
    peaks = [(1, 0), (10, 9), (11, 1000)]
    assert "grows by 991 B per K between 10 and 11" in Growth("K", slope=990).broken_by(peaks)
    assert Growth("K", slope=991).broken_by(peaks) == ""
    assert Growth("K", slope=1).broken_by([(1, 500), (10, 9)]) == ""


def test_a_contract_takes_everything_together():
    stated = contract(
        (), {"max_bytes": "1 MiB", "flat_in": "K", "tolerance": "1 KiB", "max_slope": {"T": 512}}, {"K": 5, "T": 2.0}
    )
    assert stated.max_bytes == 2**20
    assert stated.growths == (Growth("K", tolerance=1024), Growth("T", slope=512))


def test_origins_are_told_with_what_is_known():
    full = Alive(
        bytes=2048,
        count=2,
        operator="aten.mm",
        line="net.py:3",
        module="Net.0",
        phase="inner",
        span="hvp",
        backward=True,
    )
    text = above(4096, 1024, [full, *[Alive(bytes=100, count=1, operator="aten.add")] * 9, Alive(bytes=48, count=5)])
    assert "  2.00 KiB  2 x aten.mm  backward of net.py:3  Net.0  inner/hvp\n" in text
    assert text.endswith("    248 B  the rest")
    assert text.count("aten.add") == 7
    assert above(4096, 1024, []) == "peak memory is 4.00 KiB, above max_bytes = 1.00 KiB"


def test_the_meter_behind_the_plugin_sees_a_leak():
    """The control: what the runs above rely on."""
    kept = []
    assert PeakMemory().of(lambda: kept.append(torch.ones(KIB))) == 1024
