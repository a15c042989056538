"""What the whole suite runs under."""

import contextlib
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

import pytest
import torch
from bilevel_profiling.measurement.surroundings import frozen_heap

from bilevel.testing.ranks import Pool

torch.set_num_threads(1)  # many small problems, for which two threads on a busy machine are slower than one


class Frozen:
    """Collections look at what a test makes, and not at all of torch and of the suite, which takes 0.2 s each time."""

    def __init__(self) -> None:
        self._seen: object = None
        self._session = contextlib.ExitStack()

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Freeze what there is before the first test of a file, and before the first after something was imported."""
        if self._seen is None:
            self._session.enter_context(frozen_heap())
        if self._seen != (item.path, len(sys.modules)):
            gc.collect()
            gc.freeze()
            self._seen = item.path, len(sys.modules)

    def pytest_sessionfinish(self) -> None:
        self._session.close()


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Frozen(), "frozen")
    if not hasattr(config, "workerinput"):  # workers of pytest-xdist share the folder: they inherit the environment
        # One for the session: TorchInductor asks g++ ten times what the processor can do, 8 s, for each new folder.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder = tempfile.mkdtemp(prefix="bilevel-inductor-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pool]:
    """Processes that run a function together: `ranks.run(2, function, ...)`."""
    pool = Pool()
    yield pool
    pool.close()
