"""One thread: the tests are many small problems, for which two threads on a busy machine are slower than one."""

from collections.abc import Iterator

import pytest
import torch

from bilevel.testing.ranks import Pool

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pool]:
    """Processes that run a function together: `ranks.run(2, function, ...)`."""
    pool = Pool()
    yield pool
    pool.close()
