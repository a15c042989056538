"""Inner problems that are solved by a formula: one step lands."""

from bilevel.inner.closed_form.closed_form import ClosedForm as ClosedForm
from bilevel.inner.closed_form.kernel_ridge import KernelRidge as KernelRidge
from bilevel.inner.closed_form.least_squares import LeastSquares as LeastSquares
from bilevel.inner.closed_form.ridge import Ridge as Ridge
