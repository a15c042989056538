"""The oracles of one instance, seen once more: under another outer loss, or at an x with a graph.

What was drawn and made at the start (y_0, the shared features) is theirs, too.
"""

import copy

from bilevel.batches import Batches
from bilevel.engine.base import Derivatives
from bilevel.engine.eager import Eager
from bilevel.engine.embedding import Embedding, Source
from bilevel.engine.oracles import Oracles
from bilevel.space.tree import Tree


def facing(oracles: Oracles, batches: Batches, engine: Derivatives | None) -> Oracles:
    """The same with other data of the outer loss."""
    other = copy.copy(oracles)
    other.batches, other.engine = batches, engine or Eager().open()
    return other


def connected(oracles: Oracles, attached: Tree) -> Oracles:
    """The same with `attached`, which may have a graph, in the place of the attached x; eager."""
    other = copy.copy(oracles)
    other.attached, other.engine = attached, Eager().open()
    other.source = Source(oracles.evaluation, oracles.generators, oracles.x, attached)
    if isinstance(oracles.shared, Embedding):
        other.shared = oracles.shared.moved(other.source)
    return other
