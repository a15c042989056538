"""The outer loop as an object: it can stop at any step, be saved, and go on to the bit."""

from bilevel.loop.early_stopping import EarlyStopping as EarlyStopping
from bilevel.loop.files import DamagedFileError as DamagedFileError
from bilevel.loop.mixed_precision import MixedPrecision as MixedPrecision
from bilevel.loop.outer_loop import OuterLoop as OuterLoop
from bilevel.loop.precision_check import Precision as Precision
from bilevel.loop.precision_check import PrecisionCheck as PrecisionCheck
from bilevel.loop.progress import progress as progress
from bilevel.loop.sinks import JSONLines as JSONLines
from bilevel.loop.sinks import MLflow as MLflow
from bilevel.loop.sinks import Sink as Sink
from bilevel.loop.sinks import TensorBoard as TensorBoard
from bilevel.loop.sinks import WandB as WandB
from bilevel.loop.step import Step as Step
from bilevel.loop.values import values as values
