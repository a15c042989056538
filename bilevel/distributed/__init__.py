"""Many processes: the ranks of a torch.distributed group that compute one hypergradient together."""

from bilevel.distributed.fully_sharded import fully_sharded as fully_sharded
from bilevel.distributed.gathered import gathered as gathered
from bilevel.space.ranks import RankError as RankError
from bilevel.space.ranks import Ranks as Ranks
