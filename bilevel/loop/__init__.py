"""The outer loop as an object: it can stop at any step, be saved, and go on to the bit."""

from bilevel.loop.early_stopping import EarlyStopping as EarlyStopping
from bilevel.loop.mixed_precision import MixedPrecision as MixedPrecision
from bilevel.loop.outer_loop import OuterLoop as OuterLoop
from bilevel.loop.precision_check import Precision as Precision
from bilevel.loop.precision_check import PrecisionCheck as PrecisionCheck
from bilevel.loop.step import Step as Step
