"""What goes with `bilevel.solution`: reports of its solves, Jacobians and products of its result."""

from bilevel.layer.derivatives import jacobian as jacobian
from bilevel.layer.derivatives import jvp as jvp
from bilevel.layer.report import Report as Report
