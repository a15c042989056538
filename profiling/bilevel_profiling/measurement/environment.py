"""Where a record was made: what a reader needs to judge it, and to make it again."""

import datetime
import functools
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

import bilevel


def environment(command: str = "", device: torch.device | str = "cpu") -> dict[str, str]:
    """Versions, machine, commit, date and command. Nothing that names a user or a host.

    Args:
        command: the command line that led here.
        device: on which the work runs; a GPU is named only then.

    Example:
        >>> sorted(environment())
        ['bilevel', 'cpu', 'date', 'platform', 'python', 'threads', 'torch']
    """
    wait = os.environ.get("OMP_WAIT_POLICY", "")
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bilevel": bilevel.__version__ + (f" ({_commit()})" if _commit() else ""),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _processor(),
        "threads": f"{torch.get_num_threads()} on {os.cpu_count()} processors"
        + (f", OMP_WAIT_POLICY={wait}" if wait else ""),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if torch.device(device).type == "cuda" and torch.cuda.is_available():
        found["gpu"] = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    if command:
        found["command"] = command
    return found


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@functools.cache
def _commit() -> str:
    """The commit of the checkout that `bilevel` runs from, with "-dirty" after changes; nothing when it is installed
    from a wheel.
    """
    folder = Path(bilevel.__file__).parent

    def git(*arguments: str) -> str:
        found = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
        return found.stdout.strip()

    try:
        # A virtual environment may lie inside some other repository.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("describe", "--always", "--dirty", "--exclude=*", "--abbrev=12")
    except (OSError, subprocess.SubprocessError):
        return ""
