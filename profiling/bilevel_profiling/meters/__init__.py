"""Meters: context managers that yield numbers."""

from bilevel_profiling.meters.allocator import Allocator as Allocator
from bilevel_profiling.meters.base import Meter as Meter
from bilevel_profiling.meters.clock import Clock as Clock
from bilevel_profiling.meters.cuda import Cuda as Cuda
from bilevel_profiling.meters.oracles import Oracles as Oracles
from bilevel_profiling.meters.resident import Resident as Resident
from bilevel_profiling.meters.tensors import Tensors as Tensors
from bilevel_profiling.meters.work import Work as Work
