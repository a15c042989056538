"""Differentiable inner optimizers: pure, out of place, equal to torch.optim step by step."""

from bilevel.optim.adam import Adam as Adam
from bilevel.optim.adam import AdamW as AdamW
from bilevel.optim.base import Hyper as Hyper
from bilevel.optim.base import Optimizer as Optimizer
from bilevel.optim.scheduled import Scheduled as Scheduled
from bilevel.optim.sgd import SGD as SGD
