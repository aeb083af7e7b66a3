"""U-Net and ResUNet, from one encoder-decoder.

U-Net: Ronneberger et al. 2015, arXiv:1505.04597. Residual blocks: He et al. 2016, arXiv:1512.03385. The two
differ only in what a level is made of; `build_model` is the one place that reads the configuration.
"""

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from saltray.config import TILE, ModelConfig, UserError
from saltray.network import pretrained
from saltray.network.layers import (
    Dropout,
    Hypercolumn,
    ResidualBlock,
    Stage,
    Style,
    crop,
    enlarge,
    lay_over,
    pad,
    plain_stage,
    residual_stage,
)

DEEPEST = 1000.0
"""The depth z that a network sees as 1; the contest's lie between 50 and 959."""


class Outputs(NamedTuple):
    """What a deeply supervised network returns in training."""

    logits: Tensor
    """Of salt, float (n, h, w)."""
    auxiliary: tuple[Tensor, ...]
    """The same from each level of the decoder but the last, coarsest first."""
    empty: Tensor
    """Logits of "this tile has no salt", float (n,)."""


class Encoder(NamedTuple):
    """The way down: a stage a level, finest first, the bottom last."""

    stages: list[nn.Module]
    widths: list[int]
    """Channels that each stage puts out."""
    pooled: bool
    """Whether max-pooling and dropout halve the tile between the stages; else they do it themselves."""


@dataclass(frozen=True)
class Input:
    """How a tile becomes the network's input, and the network's output the tile's."""

    coordinates: bool = False
    depth: bool = False
    border: int = 0
    """Rows, and columns, that are added."""
    padding: Literal["edge", "reflect"] = "reflect"
    upscale: int = 1

    @property
    def channels(self) -> int:
        """Channels of the input: the image, then the vertical position, then the depth."""
        return 1 + self.coordinates + self.depth

    def make(self, images: Tensor, depth: Tensor | None) -> Tensor:
        """Pad and enlarge images (n, 1, h, w), and append what else the network sees."""
        x = pad(images, self.border, self.padding) if self.border else images
        if self.upscale > 1:
            x = enlarge(x, self.upscale)
        channels = [x]
        if self.coordinates:
            rows = torch.linspace(-1, 1, x.shape[2], dtype=x.dtype, device=x.device)
            channels.append(rows[:, None].expand_as(x))
        if self.depth:
            if depth is None:
                raise UserError("this network takes the depth z of each tile (model/depth): none was given")
            channels.append((depth.to(x.dtype) / DEEPEST)[:, None, None, None].expand_as(x))
        return torch.cat(channels, dim=1) if len(channels) > 1 else x

    def unmake(self, logits: Tensor, height: int, width: int) -> Tensor:
        """Reduce logits (n, 1, H, W), where they are larger, and crop them to the tile's (n, h, w)."""
        factor = logits.shape[2] // (height + self.border)
        if factor > 1:
            logits = functional.avg_pool2d(logits, factor)
        return crop(logits, height, width).squeeze(1)


class EncoderDecoder(nn.Module):
    """A U-shaped network: halved on the way down, upsampled by transposed convolutions, with skips."""

    def __init__(
        self,
        encoder: Encoder,
        stage: Stage,
        widths: list[int],
        dropout: float,
        prepare: Input = Input(),
        hypercolumn: Hypercolumn | None = None,
        deep_supervision: bool = False,
    ) -> None:
        """Make the network.

        Args:
            encoder: the way down.
            stage: makes the convolutions of one level of the decoder.
            widths: channels of each level of the decoder, finest first.
            dropout: ratio after each pool (half of it after the first) and each concatenation.
            prepare: what is done to a tile beforehand.
            hypercolumn: joins the decoder's levels before the head.
            deep_supervision: whether to make the auxiliary heads.
        """
        super().__init__()
        levels = len(widths)
        self.prepare = prepare
        self.pool = nn.MaxPool2d(2) if encoder.pooled else nn.Identity()
        self.encoder = nn.ModuleList(encoder.stages[:-1])
        ratios = [dropout / 2 if i == 0 else dropout for i in range(levels)]
        self.encoder_dropout = nn.ModuleList(Dropout(r if encoder.pooled else 0.0) for r in ratios)
        self.bottom = encoder.stages[-1]
        upward = [encoder.widths[-1], *reversed(widths)]
        self.upsample = nn.ModuleList(nn.ConvTranspose2d(i, o, 3, stride=2) for i, o in pairwise(upward))
        self.decoder_dropout = nn.ModuleList(Dropout(dropout) for _ in range(levels))
        skips = reversed(encoder.widths[:-1])
        self.decoder = nn.ModuleList(stage(w + s, w) for w, s in zip(reversed(widths), skips, strict=True))
        self.hypercolumn = hypercolumn
        self.head = nn.Conv2d(widths[0], 1, 1)
        self.auxiliary = nn.ModuleList(
            nn.Conv2d(w, 1, 1) for w in reversed(widths[1:] if deep_supervision else [])
        )
        self.empty = nn.Linear(encoder.widths[-1], 1) if deep_supervision else None
        self.apply(_initialise)

    def forward(self, images: Tensor, depth: Tensor | None = None) -> Tensor | Outputs:
        """Map images, float (n, 1, h, w) in [0, 1], to logits of salt, float (n, h, w).

        In training, with deep supervision, the logits come with those of the auxiliary heads.

        Args:
            images: the tiles.
            depth: their depth z, float (n,); only a network that was built with `depth` reads it.

        Raises:
            UserError: the depth is needed and absent.
        """
        height, width = images.shape[2:]
        x, skips, levels = self.prepare.make(images, depth), [], []
        for stage, dropout in zip(self.encoder, self.encoder_dropout, strict=True):
            x = stage(x)
            skips.append(x)
            x = dropout(self.pool(x))
        x = bottom = self.bottom(x)
        for upsample, dropout, stage in zip(self.upsample, self.decoder_dropout, self.decoder, strict=True):
            skip = skips.pop()
            # Stride 2 and kernel 3 make 2n + 1 of n pixels: right for an odd skip ("valid"); for an even
            # one the last row and column go, which is what "same" padding does in TensorFlow.
            x = upsample(x)[:, :, : skip.shape[2], : skip.shape[3]]
            x = stage(dropout(torch.cat([x, skip], dim=1)))
            levels.append(x)
        if self.hypercolumn is not None:
            x = self.hypercolumn(levels)
        logits = self.prepare.unmake(self.head(x), height, width)
        if self.empty is None or not self.training:
            return logits
        auxiliary = (
            self.prepare.unmake(lay_over(head(level), x.shape[2:]), height, width)
            for head, level in zip(self.auxiliary, levels[:-1], strict=True)
        )
        return Outputs(logits, tuple(auxiliary), self.empty(bottom.mean(dim=(2, 3))).squeeze(1))


def _initialise(module: nn.Module) -> None:
    """Set weights for ReLU networks (He et al. 2015, arXiv:1502.01852) and biases to zero."""
    # On the meta device nothing is there to set, and PyTorch would import its compiler for it: a second.
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and not module.weight.is_meta:
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def build_model(config: ModelConfig) -> EncoderDecoder:
    """Build the network that the configuration describes, on the CPU, in float32, channels-last.

    Channels-last is the faster memory layout for convolutions on CPUs and on GPUs with tensor cores. An
    EfficientNet-Lite starts at random here: `load_encoder` gives a new trial its weights.
    """
    residual = config.architecture == "resunet"
    automatic: Literal["none", "batch"] = "batch" if residual else "none"
    style = Style(
        automatic if config.normalisation == "auto" else config.normalisation,
        config.activation,
        config.preactivation and residual,
        config.scse,
    )
    stage: Stage = (
        partial(residual_stage, style=style, blocks=config.residual_blocks)
        if residual
        else partial(plain_stage, style=style)
    )
    border = config.padded_size - TILE
    prepare = Input(config.coordinates, config.depth, border, config.padding, config.upscale)
    widths = [min(config.filters * 2**i, config.max_filters) for i in range(config.levels + 1)]
    if config.encoder == "own":
        channels = zip([prepare.channels, *widths], widths, strict=False)
        encoder = Encoder([stage(i, o) for i, o in channels], widths, pooled=True)
    else:
        stages = pretrained.build_stages(config.encoder, prepare.channels)[: config.levels + 1]
        outputs = pretrained.widths(config.encoder)[: config.levels + 1]
        if config.upscale == 2:
            # Halved once, an enlarged tile has its own size again: the decoder ends there.
            stages, outputs = [nn.Sequential(*stages[:2]), *stages[2:]], outputs[1:]
            widths.pop()
        encoder = Encoder(stages, outputs, pooled=False)
    model = EncoderDecoder(
        encoder,
        stage,
        widths[:-1],
        config.dropout,
        prepare,
        Hypercolumn(widths[-2::-1], style) if config.hypercolumn else None,
        config.deep_supervision,
    )
    for module in model.modules():
        if isinstance(module, ResidualBlock) and config.zero_init_residual:
            module.start_as_identity()
        if isinstance(module, pretrained.GreyToColour):
            module.start_as_copies()
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def load_encoder(model: EncoderDecoder, config: ModelConfig) -> None:
    """Give a new trial's encoder the weights that its configuration names, if it names any.

    Raises:
        UserError: there are none there, or they do not fit; the message names the file.
    """
    if config.encoder_weights is not None:
        stages = [*model.encoder, model.bottom]
        pretrained.load_weights(stages, config.encoder, config.encoder_weights)


def count_parameters(model: nn.Module) -> int:
    """Count the trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast type for `TrialConfig.precision` on this device; None for plain float32."""
    if precision == "bfloat16":
        return torch.bfloat16
    if precision == "float16":
        return torch.float16 if device.type == "cuda" else None
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if precision == "auto" and fast else None


def to_input(images: Tensor, device: torch.device) -> Tensor:
    """Map uint8 images (n, h, w) to the network's input, float32 (n, 1, h, w) in [0, 1]."""
    # As bytes over the bus: a quarter of what floats would take.
    # From a GPU to the CPU nothing may run ahead: the pixels would be read before they are there.
    pixels = images.to(device, non_blocking=device.type == "cuda").unsqueeze(1).float().div_(255)
    return pixels.contiguous(memory_format=torch.channels_last)
