"""Where the numbers of a run go."""

from bilevel.loop.sinks.base import Sink as Sink
from bilevel.loop.sinks.json_lines import JSONLines as JSONLines
from bilevel.loop.sinks.mlflow import MLflow as MLflow
from bilevel.loop.sinks.tensorboard import TensorBoard as TensorBoard
from bilevel.loop.sinks.wandb import WandB as WandB
