"""A decoder-only transformer (Vaswani et al. 2017; pre-norm as in Radford et al. 2019), twice differentiable.

    h = tokens[s] + positions
    h += attention(norm(h)),  h += mlp(norm(h)),  L times
    scores = head(norm(h))

12 L W^2 numbers in the blocks, for L layers of width W, and (2 V + C) W + O(L W) in the rest: vocabulary V, context C.
What one gradient keeps of B sequences is about B C W (16 L) numbers and, because attention is written out, B H C^2
(2 L) more for H heads.

Attention is two products and a softmax in plain sight. torch's fused kernels (scaled_dot_product_attention: flash,
memory-efficient, cuDNN) have no double backward, so no hypergradient but a first-order one could go through them;
`torch.nn.attention.sdpa_kernel(SDPBackend.MATH)` around every call would force the same arithmetic as here, in a
context manager that each user of the loss would have to remember. Nothing here looks at a tensor's value: the forward
runs under torch.func.functional_call, vmap, fake tensors and a compiler alike.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import bilevel as bl


class Transformer(nn.Module):
    """Scores of the next token at each place: tokens long [B, T] to [B, T, V], T at most C.

    Args:
        vocabulary: V.
        context: C, the longest sequence.
        layers: L.
        width: W, a multiple of `heads`.
        heads: H.

    Raises:
        ValueError: `width` is not a multiple of `heads`, or a size is smaller than 1.

    Example:
        >>> module = Transformer(vocabulary=10, context=8, layers=1, width=16, heads=2)
        >>> module(torch.zeros(3, 8, dtype=torch.long)).shape
        torch.Size([3, 8, 10])
    """

    def __init__(
        self, *, vocabulary: int = 256, context: int = 64, layers: int = 2, width: int = 64, heads: int = 4
    ) -> None:
        super().__init__()
        sizes = {"vocabulary": vocabulary, "context": context, "layers": layers, "width": width, "heads": heads}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"Transformer was given {name}={size}; at least 1 was needed")
        if width % heads:
            raise ValueError(
                f"Transformer was given width={width} and heads={heads}; a width that the heads divide was needed"
            )
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.empty(context, width))
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.positions, std=_STD)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[-1]
        hidden = self.tokens(tokens) + self.positions[:length]
        # Made here and not kept as a buffer, which would have to follow the parameters to their device. -inf is added,
        # not filled in: a sum keeps nothing for its backward.
        mask = torch.full((length, length), float("-inf"), dtype=hidden.dtype, device=hidden.device).triu(1)
        for block in self.blocks:
            hidden = block(hidden, mask)
        scores: Tensor = self.head(self.norm(hidden))
        return scores


class Block(nn.Module):
    """Attention and a perceptron of four times the width, each on the normalized stream and added to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden), mask)
        narrowed: Tensor = self.narrow(nn.functional.gelu(self.widen(self.mlp_norm(hidden))))
        return hidden + narrowed


class Attention(nn.Module):
    """softmax(q k^T / sqrt(W / H) + mask) v, head by head: [B, T, W] to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.mix = (nn.Linear(width, width) for _ in range(4))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        # [B, T, W] -> [B, H, T, W / H]
        query, key, value = (
            part(hidden).unflatten(-1, (self.heads, -1)).transpose(-3, -2)
            for part in (self.query, self.key, self.value)
        )
        scaled = query * query.shape[-1] ** -0.5  # before the product: [T, W / H] numbers to scale, not [T, T]
        weights = torch.softmax(scaled @ key.mT + mask, -1)
        mixed: Tensor = self.mix((weights @ value).transpose(-3, -2).flatten(-2))
        return mixed


def transformer(
    *,
    vocabulary: int = 256,
    context: int = 64,
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """`(call, params)` as from `functional`, the parameters drawn from a seed: the same on every device.

    The module itself holds no numbers (it is on torch's "meta" device), so that the parameters exist once; under fake
    tensors not even once.

    Args:
        vocabulary: V.
        context: C, the longest sequence.
        layers: L.
        width: W, a multiple of `heads`.
        heads: H.
        seed: of the parameters. The global random state is left alone.
        dtype: of the parameters.
        device: of the parameters.

    Raises:
        ValueError: see `Transformer`.

    Example:
        >>> call, params = transformer(width=16, context=8)
        >>> call(params, torch.zeros(3, 8, dtype=torch.long)).shape
        torch.Size([3, 8, 256])
    """
    with torch.device("meta"):
        module = Transformer(vocabulary=vocabulary, context=context, layers=layers, width=width, heads=heads)
    call, shapes = bl.functional(module)
    # On the CPU in float32, so that every device and dtype starts alike; one by one, so that there is no second copy of
    # them all.
    generator = torch.Generator().manual_seed(seed)
    branch = (2 * layers) ** -0.5  # the blocks' outputs add up along the stream
    params = {}
    for name, shape in shapes.items():
        drawn = torch.empty(shape.shape, device="cpu", dtype=torch.float32)
        if name.endswith("bias"):
            drawn.zero_()
        elif "norm" in name:
            drawn.fill_(1.0)
        else:
            std = shape.shape[-1] ** -0.5 if name.startswith("blocks.") else _STD
            drawn.normal_(0.0, std * (branch if "mix" in name or "narrow" in name else 1.0), generator=generator)
        params[name] = drawn.to(device=device, dtype=dtype)
    return call, params


_STD = 0.02
