"""What was found, as data: records, their files, how a run can fail, the laws of growth, and how numbers are written.

Nothing here imports torch or bilevel, so that records can be read and shown anywhere.
"""

from bilevel_profiling.records.record import Alive as Alive
from bilevel_profiling.records.record import Function as Function
from bilevel_profiling.records.record import Iteration as Iteration
from bilevel_profiling.records.record import Phase as Phase
from bilevel_profiling.records.record import Point as Point
from bilevel_profiling.records.record import Record as Record
from bilevel_profiling.records.records_file import read as read
from bilevel_profiling.records.records_file import scan as scan
