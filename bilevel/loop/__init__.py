"""The outer loop as an object: it can stop at any step, be saved, and go on to the bit."""

from bilevel.loop.outer_loop import OuterLoop as OuterLoop
from bilevel.loop.step import Step as Step
