"""Many processes: the ranks of a torch.distributed group that compute one hypergradient together."""

from bilevel.distributed.data_parallel import data_parallel as data_parallel
from bilevel.distributed.fully_sharded import fully_sharded as fully_sharded
from bilevel.distributed.gathered import gathered as gathered
from bilevel.distributed.split import share as share
from bilevel.distributed.split import split as split
from bilevel.space.ranks import RankError as RankError
from bilevel.space.ranks import Ranks as Ranks
