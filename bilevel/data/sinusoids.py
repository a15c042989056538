"""Sinusoids: regression tasks y = A sin(x - phase), each with its own amplitude and phase.

Reference for the settings: the code of Ji, Yang, Liang, arXiv 2002.07836 version 1
(github.com/JunjieYang97/GGS-MAML-DL, regression_train.py): A in U[0.1, 5], phase in U[0, pi], x in U[-5, 5], 10 support
and 10 query examples, 25 tasks per step. The family itself is that of Finn et al. 2017, arXiv 1703.03400.
"""

import math
from typing import Any

import torch

from bilevel.data._checks import floating, whole
from bilevel.data.stream import Drawn, TaskStream

AMPLITUDE, PHASE, INPUT = (0.1, 5.0), (0.0, math.pi), (-5.0, 5.0)
"""Ranges of uniform draws."""


class Sinusoids(TaskStream):
    """A loader of sinusoid tasks: support and query pairs (x, y), each of shape [T, examples, 1].

    Args:
        tasks: T, tasks in each batch.
        support: examples to adapt on.
        query: examples to be judged on.
        seed, steps, pool, device: as for `TaskStream`.
        dtype: of x and y.

    Raises:
        TypeError, ValueError: a number is not whole or too small, or `dtype` is not floating.

    Example:
        >>> x, y = Sinusoids(tasks=3)[0].inner
        >>> tuple(x.shape), tuple(y.shape), bool(y.abs().max() <= 5)
        ((3, 10, 1), (3, 10, 1), True)
    """

    def __init__(
        self,
        *,
        tasks: int = 25,
        support: int = 10,
        query: int = 10,
        seed: int = 0,
        steps: int | None = None,
        pool: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(tasks=tasks, seed=seed, steps=steps, pool=pool, device=device)
        self.support = whole("Sinusoids", "support", support)
        self.query = whole("Sinusoids", "query", query)
        self.dtype = floating("Sinusoids", dtype)

    def settings(self) -> dict[str, Any]:
        return {"support": self.support, "query": self.query}

    def parameters(self, number: int) -> tuple[float, float]:
        """Amplitude and phase of task `number`."""
        rng = self.generator("task", number)
        return rng.uniform(*AMPLITUDE), rng.uniform(*PHASE)

    def draw(self, numbers: list[int]) -> Drawn:
        inputs, targets = [], []
        for number in numbers:
            amplitude, phase = self.parameters(number)
            rng = self.generator("inputs", number)
            points = [rng.uniform(*INPUT) for _ in range(self.support + self.query)]
            inputs.append(points)
            targets.append([amplitude * math.sin(point - phase) for point in points])
        x, y = (torch.tensor(values, dtype=self.dtype, device="cpu").unsqueeze(-1) for values in (inputs, targets))
        cut = self.support
        return Drawn((x[:, :cut], y[:, :cut]), (x[:, cut:], y[:, cut:]), [self._identity(each) for each in numbers])
