"""torch.utils.checkpoint inside a module that is called with other parameters: found, and refused.

It runs a part again in the backward, when the parameters of the call are out of their places again: the gradient would
be that at the module's own parameters, without a word.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from torch.utils import checkpoint

_inside = threading.local()
_REFUSED = (
    "the module uses torch.utils.checkpoint inside, which runs a part of it again in the backward, when the module has "
    "its own parameters again: the gradient would be that of those. Take the checkpoint out "
    "(gradient_checkpointing_disable() in transformers), and say bilevel.functional(module, rematerialize=Block), with "
    "the class of the layer, which saves more, in second derivatives too. A checkpoint around the call is right"
)


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """Raise ValueError where a checkpoint is begun inside this block, by this thread."""
    _listen()
    before = getattr(_inside, "call", False)
    _inside.call = True
    try:
        yield
    finally:
        _inside.call = before


def _listen() -> None:
    """Let what checkpoints do when they begin look at where they are; once in a process, when it is first needed."""
    begins: Any = checkpoint._checkpoint_hook
    if "__enter__" in vars(begins):
        return
    enter = begins.__enter__

    def looked_at(self: Any) -> Any:
        if getattr(_inside, "call", False):
            raise ValueError(_REFUSED)
        return enter(self)

    begins.__enter__ = looked_at
