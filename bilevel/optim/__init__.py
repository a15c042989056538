"""Differentiable inner optimizers: pure, out of place, equal to torch.optim step by step."""

from bilevel.optim.accumulated import Accumulated as Accumulated
from bilevel.optim.adadelta import Adadelta as Adadelta
from bilevel.optim.adagrad import Adagrad as Adagrad
from bilevel.optim.adam import Adam as Adam
from bilevel.optim.adam import AdamW as AdamW
from bilevel.optim.adamax import Adamax as Adamax
from bilevel.optim.base import Hyper as Hyper
from bilevel.optim.base import Optimizer as Optimizer
from bilevel.optim.clipped_by_norm import ClippedByNorm as ClippedByNorm
from bilevel.optim.clipped_by_value import ClippedByValue as ClippedByValue
from bilevel.optim.from_torch import FromTorch as FromTorch
from bilevel.optim.from_torchopt import FromTorchopt as FromTorchopt
from bilevel.optim.groups import Groups as Groups
from bilevel.optim.lion import Lion as Lion
from bilevel.optim.muon import Muon as Muon
from bilevel.optim.nadam import NAdam as NAdam
from bilevel.optim.radam import RAdam as RAdam
from bilevel.optim.rmsprop import RMSprop as RMSprop
from bilevel.optim.scheduled import Scheduled as Scheduled
from bilevel.optim.schedules import Schedules as Schedules
from bilevel.optim.sgd import SGD as SGD
from bilevel.optim.shapes import Cosine as Cosine
from bilevel.optim.shapes import StepDecay as StepDecay
from bilevel.optim.shapes import Tabulated as Tabulated
from bilevel.optim.shapes import WarmUp as WarmUp
