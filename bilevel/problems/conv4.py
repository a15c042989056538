"""The four-block convolutional network of the few-shot literature.

Four times: 3 x 3 convolution (padding 1), batch normalization, ReLU, 2 x 2 max-pooling; then a linear head. Batch
normalization always uses the statistics of the batch, at test time too, as MAML does (transductive), and keeps none:
the forward is a pure function of the parameters.

Reference: Vinyals et al. 2016, arXiv 1606.04080; Finn et al. 2017, Model-Agnostic Meta-Learning, arXiv 1703.03400,
whose Omniglot network has 64 channels and strided convolutions, and whose miniImageNet network is this one.
"""

from torch import nn

from bilevel.problems._nets import seeded


def conv4(way: int = 5, *, channels: int = 1, side: int = 28, width: int = 32, seed: int = 0) -> nn.Sequential:
    """Build the network on the CPU, its parameters drawn from a seed alone.

    Args:
        way: outputs.
        channels: of the images.
        side: height and width of the images, at least 16.
        width: channels of every block.
        seed: of PyTorch's default initialization.

    Raises:
        ValueError: `side` is smaller than 16, so that nothing is left after four poolings.

    Example:
        >>> import torch
        >>> conv4(way=5)(torch.zeros(25, 1, 28, 28)).shape
        torch.Size([25, 5])
    """
    if side < 16:
        raise ValueError(
            f"conv4() was given side={side}; at least 16 was needed, because each of four poolings halves it"
        )
    with seeded(seed):
        layers: list[nn.Module] = []
        for block in range(4):
            layers += [
                nn.Conv2d(channels if block == 0 else width, width, 3, padding=1),
                nn.BatchNorm2d(width, track_running_stats=False),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * (side // 16) ** 2, way))
