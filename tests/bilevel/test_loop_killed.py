"""kill -9 at a hundred random moments."""

import pathlib
import re
import subprocess
import sys

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "benchmarks" / "kill_resume.py"


def test_a_run_that_is_killed_a_hundred_times_ends_as_one_that_is_not():
    done = subprocess.run(
        [sys.executable, SCRIPT, "--kills", "100"], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    first, *words = done.stdout.split()
    assert (first, words[0]) == ("100", "kills,")
    assert int(words[1]) > 10  # while a file was written
    assert re.search(r"(\d+) of \1 parts of the state are those of the undisturbed run, to the bit", done.stdout)
