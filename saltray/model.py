"""U-Net and ResUNet, from one encoder-decoder.

U-Net: Ronneberger et al. 2015, arXiv:1505.04597. Residual blocks: He et al. 2016, arXiv:1512.03385. The two
differ only in what a level is made of; `build_model` is the one place that reads the configuration.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from saltray.config import ModelConfig

Stage = Callable[[int, int], nn.Module]
"""Makes one level's convolutions, from input channels to output channels."""


class ResidualBlock(nn.Module):
    """conv-BN-ReLU, conv-BN, add the input, ReLU: (n, c, h, w) -> the same shape."""

    def __init__(self, channels: int) -> None:
        """Make a block of two 3x3 convolutions."""
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        return torch.relu_(self.body(x) + x)


def plain_stage(inputs: int, outputs: int) -> nn.Module:
    """Make the U-Net's level: two 3x3 convolutions, each with a ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.ReLU(inplace=True),
    )


def residual_stage(inputs: int, outputs: int, blocks: int) -> nn.Module:
    """Make the ResUNet's level: a plain 3x3 convolution, then residual blocks."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), *(ResidualBlock(outputs) for _ in range(blocks))
    )


class EncoderDecoder(nn.Module):
    """A U-shaped network: max-pooled down, upsampled by transposed convolutions, with concatenated skips."""

    def __init__(self, stage: Stage, filters: int, levels: int, dropout: float) -> None:
        """Make the network.

        Args:
            stage: makes a level's convolutions.
            filters: channels of the first level, doubled at each level below.
            levels: how often the tile is halved.
            dropout: ratio after each pool (half of it after the first) and each concatenation.
        """
        super().__init__()
        widths = [filters * 2**i for i in range(levels + 1)]
        self.pool = nn.MaxPool2d(2)
        self.encoder = nn.ModuleList(stage(i, o) for i, o in zip([1, *widths], widths[:-1], strict=False))
        self.encoder_dropout = nn.ModuleList(
            nn.Dropout(dropout / 2 if i == 0 else dropout) for i in range(levels)
        )
        self.bottom = stage(widths[-2], widths[-1])
        self.upsample = nn.ModuleList(
            nn.ConvTranspose2d(2 * w, w, 3, stride=2) for w in reversed(widths[:-1])
        )
        self.decoder_dropout = nn.ModuleList(nn.Dropout(dropout) for _ in range(levels))
        self.decoder = nn.ModuleList(stage(2 * w, w) for w in reversed(widths[:-1]))
        self.head = nn.Conv2d(filters, 1, 1)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """Map images, float (n, 1, h, w) in [0, 1], to logits of salt, float (n, h, w)."""
        x, skips = images, []
        for stage, dropout in zip(self.encoder, self.encoder_dropout, strict=True):
            x = stage(x)
            skips.append(x)
            x = dropout(self.pool(x))
        x = self.bottom(x)
        for upsample, dropout, stage in zip(self.upsample, self.decoder_dropout, self.decoder, strict=True):
            skip = skips.pop()
            # Stride 2 and kernel 3 make 2n + 1 of n pixels: right for an odd skip ("valid"); for an even
            # one the last row and column go, which is what "same" padding does in the seed's framework.
            x = upsample(x)[:, :, : skip.shape[2], : skip.shape[3]]
            x = stage(dropout(torch.cat([x, skip], dim=1)))
        return self.head(x).squeeze(1)  # type: ignore[no-any-return]


def _initialise(module: nn.Module) -> None:
    """Set weights for ReLU networks (He et al. 2015, arXiv:1502.01852) and biases to zero."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def build_model(config: ModelConfig) -> EncoderDecoder:
    """Build the network that the configuration describes, on the CPU, in float32, channels-last.

    Channels-last is the faster memory layout for convolutions on CPUs and on GPUs with tensor cores.
    """
    stage: Stage
    if config.architecture == "unet":
        stage = plain_stage
    else:

        def stage(inputs: int, outputs: int) -> nn.Module:
            return residual_stage(inputs, outputs, config.residual_blocks)

    model = EncoderDecoder(stage, config.filters, config.levels, config.dropout)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def count_parameters(model: nn.Module) -> int:
    """Count the trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
