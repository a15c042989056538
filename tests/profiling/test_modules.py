"""What torch's modules and functionals cost is forecast to the byte, or the forecast names the operator that hides."""

import pytest
import torch
from bilevel_profiling import forecast, measure
from torch import nn
from torch.nn import functional as F


def vectors(*shape):
    return lambda: (torch.randn(*shape),)


def pair(*shape):
    return lambda: (torch.randn(*shape), torch.rand(*shape))


IMAGES, SIGNALS, VOLUMES, ROWS, STEPS = (
    vectors(2, 4, 12, 12), vectors(2, 4, 24), vectors(2, 4, 6, 6, 6), vectors(8, 16), vectors(5, 3, 8),
)  # fmt: skip
LABELS = lambda: (torch.randn(8, 5), torch.randint(0, 5, (8,)))  # noqa: E731
SIGNS = lambda: (torch.randn(8, 5), torch.randint(0, 2, (8, 5)) * 2.0 - 1)  # noqa: E731
MODULES = {
    **{f"{kind.__name__} {layers}": (lambda kind=kind, layers=layers: kind(8, 16, layers), STEPS)
       for kind in (nn.RNN, nn.GRU, nn.LSTM) for layers in (1, 2)},
    "LSTM both ways": (lambda: nn.LSTM(8, 16, 2, bidirectional=True, dropout=0.3), STEPS),
    "LSTM projected": (lambda: nn.LSTM(8, 16, proj_size=4), STEPS),
    "LSTM frozen": (lambda: nn.LSTM(8, 16).requires_grad_(False).eval(), STEPS),
    "LSTMCell": (lambda: nn.LSTMCell(16, 8), ROWS),
    "GRUCell": (lambda: nn.GRUCell(16, 8), ROWS),
    "RNNCell": (lambda: nn.RNNCell(16, 8), ROWS),
    "Linear": (lambda: nn.Linear(16, 8), ROWS),
    "Bilinear": (lambda: nn.Bilinear(16, 16, 3), pair(8, 16)),
    "Embedding": (lambda: nn.Embedding(10, 8), lambda: (torch.randint(0, 10, (6,)),)),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(10, 8), lambda: (torch.randint(0, 10, (6, 3)),)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3), SIGNALS),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2), IMAGES),
    "Conv2d groups": (lambda: nn.Conv2d(4, 8, 3, groups=4), IMAGES),
    "Conv2d dilated": (lambda: nn.Conv2d(4, 8, 3, dilation=2), IMAGES),
    "Conv2d reflect": (lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), IMAGES),
    "Conv3d": (lambda: nn.Conv3d(4, 6, 3), VOLUMES),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3), SIGNALS),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), IMAGES),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 6, 3), VOLUMES),
    **{f"{kind.__name__}": (lambda kind=kind: kind(4), given)
       for kind, given in ((nn.BatchNorm1d, SIGNALS), (nn.BatchNorm2d, IMAGES), (nn.InstanceNorm2d, IMAGES))},
    "BatchNorm2d eval": (lambda: nn.BatchNorm2d(4).eval(), IMAGES),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), IMAGES),
    "LayerNorm": (lambda: nn.LayerNorm(16), ROWS),
    "RMSNorm": (lambda: nn.RMSNorm(16), ROWS),
    "LocalResponseNorm": (lambda: nn.LocalResponseNorm(2), IMAGES),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(8, 2), lambda: (torch.randn(5, 3, 8),) * 3),
    "TransformerEncoder": (lambda: nn.TransformerEncoderLayer(8, 2, 16), STEPS),
    "TransformerEncoder eval": (lambda: nn.TransformerEncoderLayer(8, 2, 16).eval(), STEPS),
    "TransformerDecoder": (lambda: nn.TransformerDecoderLayer(8, 2, 16), pair(5, 3, 8)),
    **{kind.__name__: (lambda kind=kind: kind(2), IMAGES)
       for kind in (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.PixelShuffle,
                    nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d)},
    "MaxPool1d": (lambda: nn.MaxPool1d(2), SIGNALS),
    "MaxPool3d": (lambda: nn.MaxPool3d(2), VOLUMES),
    "LPPool2d": (lambda: nn.LPPool2d(2, 2), IMAGES),
    "FractionalMaxPool2d": (lambda: nn.FractionalMaxPool2d(2, output_size=5), IMAGES),
    "MaxUnpool2d": (lambda: lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), IMAGES),
    "Upsample": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), IMAGES),
    "Upsample bicubic": (lambda: nn.Upsample(scale_factor=2, mode="bicubic"), IMAGES),
    "Upsample nearest": (lambda: nn.Upsample(scale_factor=2), IMAGES),
    **{kind.__name__: (kind, ROWS)
       for kind in (nn.ReLU, nn.GELU, nn.SiLU, nn.ELU, nn.CELU, nn.SELU, nn.Mish, nn.Softplus, nn.Softsign, nn.Tanh,
                    nn.Sigmoid, nn.LogSigmoid, nn.Hardswish, nn.Hardtanh, nn.PReLU, nn.RReLU, nn.Softshrink, nn.GLU,
                    nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout)},
    "Dropout2d": (nn.Dropout2d, IMAGES),
    "Softmax": (lambda: nn.Softmax(-1), ROWS),
    "LogSoftmax": (lambda: nn.LogSoftmax(-1), ROWS),
    **{f"{kind.__name__} {reduction}": (lambda kind=kind, reduction=reduction: kind(reduction=reduction), given)
       for reduction in ("mean", "none")
       for kind, given in ((nn.CrossEntropyLoss, LABELS), (nn.MultiMarginLoss, LABELS), (nn.MSELoss, pair(8, 5)),
                           (nn.L1Loss, pair(8, 5)), (nn.SmoothL1Loss, pair(8, 5)), (nn.HuberLoss, pair(8, 5)),
                           (nn.KLDivLoss, pair(8, 5)), (nn.PoissonNLLLoss, pair(8, 5)), (nn.SoftMarginLoss, SIGNS),
                           (nn.BCEWithLogitsLoss, pair(8, 5)), (nn.HingeEmbeddingLoss, SIGNS))},
    "BCELoss": (lambda: lambda x, y: F.binary_cross_entropy(x.sigmoid(), y), pair(8, 5)),
    "CosineEmbeddingLoss": (lambda: lambda x, y: F.cosine_embedding_loss(x, y, torch.ones(8)), pair(8, 5)),
    "TripletMarginLoss": (lambda: lambda x, y: F.triplet_margin_loss(x, y, x + y), pair(8, 5)),
    "CosineSimilarity": (nn.CosineSimilarity, pair(8, 5)),
    "fold": (lambda: lambda x: F.fold(x, (8, 8), 3), vectors(2, 27, 36)),
    "fold of one": (lambda: lambda x: F.fold(x, (8, 8), 8), vectors(2, 192, 1)),
    "unfold": (lambda: lambda x: F.unfold(x, 3), IMAGES),
    "grid_sample": (lambda: lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1), align_corners=False), IMAGES),
    "affine_grid": (lambda: lambda x: F.affine_grid(x, [2, 1, 5, 5], align_corners=False), vectors(2, 2, 3)),
    "cdist": (lambda: torch.cdist, pair(8, 5)),
    "fft": (lambda: torch.fft.rfft, ROWS),
    "einsum": (lambda: lambda x, y: torch.einsum("ij,kj->ik", x, y), pair(8, 5)),
    "svd": (lambda: torch.linalg.svdvals, ROWS),
    "solve": (lambda: lambda x: torch.linalg.solve(x @ x.mT + torch.eye(8), x), ROWS),
    "cholesky": (lambda: lambda x: torch.linalg.cholesky(x @ x.mT + torch.eye(8)), ROWS),
    "eigh": (lambda: lambda x: torch.linalg.eigvalsh(x @ x.mT), ROWS),
    "inv": (lambda: lambda x: torch.linalg.inv(x @ x.mT + torch.eye(8)), ROWS),
    "logdet": (lambda: lambda x: torch.logdet(x @ x.mT + torch.eye(8)), ROWS),
    "matrix_exp": (lambda: lambda x: torch.matrix_exp(x @ x.mT / 99), ROWS),
    "attention": (lambda: F.scaled_dot_product_attention, lambda: (torch.randn(2, 2, 6, 8),) * 3),
    "logsumexp": (lambda: lambda x: torch.logsumexp(x, 0), ROWS),
    "sort": (lambda: lambda x: x.sort(0).values, ROWS),
    "cumsum": (lambda: lambda x: x.cumsum(0), ROWS),
    "std": (lambda: lambda x: x.std(0), ROWS),
    "pad": (lambda: lambda x: F.pad(x, (1, 2)), ROWS),
}  # fmt: skip
HIDDEN = {
    **dict.fromkeys(("LSTM 1", "LSTM 2", "LSTM both ways", "LSTM frozen"), "aten.mkldnn_rnn_layer"),
    "EmbeddingBag": "aten._embedding_bag",
}
"""Those with something whose size the kernel alone knows, and the operator that the note must name."""


def step(make, inputs):
    """Forward and backward, to all that is floating."""
    torch.manual_seed(0)
    module, given = make(), inputs()
    wanted = given[:1] if "Loss" in type(module).__name__ else given  # no gradient for a loss's target
    for leaf in wanted:
        leaf.requires_grad_(leaf.is_floating_point())
    outputs = [out for out in torch.utils._pytree.tree_leaves(module(*given)) if out.requires_grad]
    wanted = [*(module.parameters() if isinstance(module, nn.Module) else ()), *given]
    wanted = list(dict.fromkeys(leaf for leaf in wanted if leaf.requires_grad))
    torch.autograd.grad(sum(out.abs().sum() for out in outputs), wanted, allow_unused=True)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.filterwarnings("ignore:reduction")
@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_forecast_to_the_byte_or_said(name):
    make, inputs = MODULES[name]
    found, real = (ask(lambda: step(make, inputs)) for ask in (forecast, lambda call: measure(call, repeats=1)))
    if name in HIDDEN:
        assert found.peak_tensor_bytes < real.peak_tensor_bytes
        assert any(HIDDEN[name] in note and "Too low" in note for note in found.notes)
    else:
        assert found.notes == ()
        assert found.peak_tensor_bytes == real.peak_tensor_bytes
        assert found.alive == real.alive
