"""RandomNets: regression tasks whose targets are random networks, with controllable re-use of features.

    y = net_W(x) + noise,   net: 1 -> H -> H -> H -> 1,   x ~ U(-1, 1)
    body (layers 1 to 3):  W ~ N(centre, body_std^2)      head (layer 4):  W ~ N(centre, head_std^2)

The centre, N(0, 1) for each weight, is drawn once for each split, so that train, validation and test have different
ones. A small `body_std` beside `head_std` = 1 lets all tasks of a split share their features, and a head is enough to
adapt; a large one makes the body change from task to task, which methods that keep the body cannot follow.

After the generator of Miranda, Wang, Koyejo, "Does MAML Only Work via Feature Re-use?", with three differences: `std`
is a standard deviation here (that code gives the number called std to a normal distribution as its variance, so its 4
is our 2); targets are never doubled (its loader adds them to themselves along with the noise); noise has a seed. Biases
are drawn as weights are.
"""

import random
from typing import Any

import torch
from torch import Tensor

from bilevel.data._checks import floating, whole
from bilevel.data.classes import SPLITS
from bilevel.data.stream import Drawn, TaskStream

ACTIVATIONS = {"relu": torch.relu, "sigmoid": torch.sigmoid}
Layers = list[tuple[Tensor, Tensor]]


class RandomNets(TaskStream):
    """A loader of random-network tasks: support and query pairs (x, y), each of shape [T, examples, 1].

    Args:
        tasks: T, tasks in each batch.
        support: examples to adapt on.
        query: examples to be judged on.
        split: "train", "validation" or "test": which centre, and which tasks around it.
        body_std: standard deviation of the weights of the hidden layers around their centre, over tasks.
        head_std: of the last layer.
        hidden: H, width.
        activation: "relu" or "sigmoid".
        noise: standard deviation of the noise on y.
        seed, steps, pool, device: as for `TaskStream`. The study has 200 tasks in each split: pool=200.
        dtype: of x and y; the networks are evaluated in float64.

    Raises:
        TypeError, ValueError: a number is not whole or too small, a deviation is negative or not finite, `split` or
            `activation` is unknown, or `dtype` is not floating.

    Example:
        >>> x, y = RandomNets(tasks=2, support=5, body_std=0.1)[0].inner
        >>> tuple(x.shape), tuple(y.shape), bool(x.abs().max() <= 1)
        ((2, 5, 1), (2, 5, 1), True)
    """

    def __init__(
        self,
        *,
        tasks: int = 4,
        support: int = 10,
        query: int = 100,
        split: str = "train",
        body_std: float = 1.0,
        head_std: float = 1.0,
        hidden: int = 15,
        activation: str = "relu",
        noise: float = 0.1,
        seed: int = 0,
        steps: int | None = None,
        pool: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(tasks=tasks, seed=seed, steps=steps, pool=pool, device=device)
        self.support = whole("RandomNets", "support", support)
        self.query = whole("RandomNets", "query", query)
        self.hidden = whole("RandomNets", "hidden", hidden)
        if split not in SPLITS:
            raise ValueError(f"RandomNets was given split={split!r}; one of {', '.join(SPLITS)} was needed")
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"RandomNets was given activation={activation!r}; one of {', '.join(ACTIVATIONS)} was needed"
            )
        for name, value in {"body_std": body_std, "head_std": head_std, "noise": noise}.items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"RandomNets was given {name}={value}; a standard deviation from 0 up was needed")
        self.split, self.activation, self.noise, self.dtype = (
            split,
            activation,
            float(noise),
            floating("RandomNets", dtype),
        )
        self.body_std, self.head_std = float(body_std), float(head_std)
        self.shapes = [(hidden, 1), (hidden, hidden), (hidden, hidden), (1, hidden)]

    def settings(self) -> dict[str, Any]:
        names = ("support", "query", "split", "body_std", "head_std", "hidden", "activation", "noise")
        return {name: getattr(self, name) for name in names}

    def centre(self) -> Layers:
        """Weights and biases that the tasks of this split scatter around: float64, (weight [out, in], bias [out])."""
        return self._normal(self.generator("centre", self.split))

    def weights(self, number: int) -> Layers:
        """Weights and biases of task `number`, float64."""
        scattered = self._normal(self.generator("weights", self.split, number))
        deviations = [self.body_std] * (len(self.shapes) - 1) + [self.head_std]
        return [
            (w + std * dw, b + std * db)
            for (w, b), (dw, db), std in zip(self.centre(), scattered, deviations, strict=True)
        ]

    def target(self, number: int, x: Tensor) -> Tensor:
        """The noiseless y of task `number`, float64.

        Args:
            number: of the task.
            x: shape [examples, 1].
        """
        found = x.to(torch.float64)
        *body, (weight, bias) = self.weights(number)
        for w, b in body:
            found = ACTIVATIONS[self.activation](torch.nn.functional.linear(found, w.to(x.device), b.to(x.device)))
        return torch.nn.functional.linear(found, weight.to(x.device), bias.to(x.device))

    def draw(self, numbers: list[int]) -> Drawn:
        inputs, targets = [], []
        for number in numbers:
            rng = self.generator("examples", self.split, number)
            count = self.support + self.query
            x = torch.tensor([[rng.uniform(-1, 1)] for _ in range(count)], dtype=torch.float64, device="cpu")
            errors = torch.tensor([[rng.gauss(0, 1)] for _ in range(count)], dtype=torch.float64, device="cpu")
            inputs.append(x.to(self.dtype))
            targets.append((self.target(number, x) + self.noise * errors).to(self.dtype))
        x, y, cut = torch.stack(inputs), torch.stack(targets), self.support
        return Drawn((x[:, :cut], y[:, :cut]), (x[:, cut:], y[:, cut:]), [self._identity(each) for each in numbers])

    def _normal(self, rng: random.Random) -> Layers:
        def draw(*shape: int) -> Tensor:
            count = torch.Size(shape).numel()
            numbers = [rng.gauss(0, 1) for _ in range(count)]
            return torch.tensor(numbers, dtype=torch.float64, device="cpu").reshape(shape)

        return [(draw(out, inside), draw(out)) for out, inside in self.shapes]
