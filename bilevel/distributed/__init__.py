"""Many processes: the ranks of a torch.distributed group that compute one hypergradient together."""

from bilevel.space.ranks import RankError as RankError
from bilevel.space.ranks import Ranks as Ranks
