"""Solvers of A v = b from products A v alone."""

from bilevel.linear.base import LinearSolver as LinearSolver
from bilevel.linear.base import Prepared as Prepared
from bilevel.linear.bicgstab import BiCGSTAB as BiCGSTAB
from bilevel.linear.cg import CG as CG
from bilevel.linear.chebyshev import Chebyshev as Chebyshev
from bilevel.linear.dense import Dense as Dense
from bilevel.linear.gmres import GMRES as GMRES
from bilevel.linear.lanczos import Spectrum as Spectrum
from bilevel.linear.lanczos import spectrum as spectrum
from bilevel.linear.levenberg_marquardt import LevenbergMarquardt as LevenbergMarquardt
from bilevel.linear.lsmr import LSMR as LSMR
from bilevel.linear.masked import Masked as Masked
from bilevel.linear.minres import MINRES as MINRES
from bilevel.linear.neumann import Neumann as Neumann
from bilevel.linear.normal_cg import NormalCG as NormalCG
from bilevel.linear.nystrom import Nystrom as Nystrom
from bilevel.linear.operator import LinearOperator as LinearOperator
from bilevel.linear.operator import Product as Product
from bilevel.linear.operator import Rectangular as Rectangular
from bilevel.linear.operator import Transposed as Transposed
from bilevel.linear.preconditioners.base import Preconditioner as Preconditioner
from bilevel.linear.preconditioners.jacobi import Jacobi as Jacobi
from bilevel.linear.preconditioners.kronecker import KFAC as KFAC
from bilevel.linear.preconditioners.nystrom import NystromPreconditioner as NystromPreconditioner
