"""What networks are built of: normalisation, activation, attention, and the convolutions of one level."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Stage = Callable[[int, int], nn.Module]
"""Makes one level's convolutions, from input channels to output channels."""

GROUPS = 8
"""Of group normalisation; fewer where they do not divide the channels."""


@dataclass(frozen=True)
class Style:
    """What surrounds the convolutions of every level; the default is the baseline ResUNet."""

    normalisation: Literal["none", "batch", "group"] = "batch"
    activation: Literal["relu", "elu", "silu"] = "relu"
    preactivation: bool = False
    scse: bool = False

    def normalise(self, channels: int) -> list[nn.Module]:
        """Make the normalisation, if any: batch (Ioffe and Szegedy 2015) or group (Wu and He 2018)."""
        if self.normalisation == "none":
            return []
        if self.normalisation == "batch":
            return [nn.BatchNorm2d(channels)]
        return [nn.GroupNorm(math.gcd(channels, GROUPS), channels)]

    def activate(self, inplace: bool = True) -> nn.Module:
        """Make the activation; in place, it saves memory where nothing else reads its input."""
        if self.activation == "relu":
            return nn.ReLU(inplace)
        return nn.ELU(inplace=inplace) if self.activation == "elu" else nn.SiLU()

    def attend(self, channels: int) -> list[nn.Module]:
        """Make the attention at the end of a level, if there is one."""
        return [SCSE(channels)] if self.scse else []


class ResidualBlock(nn.Module):
    """Add two 3x3 convolutions of the input to it: (n, c, h, w) -> the same shape.

    conv-norm-act, conv-norm, add, act (He et al. 2016, arXiv:1512.03385); with preactivation norm-act-conv
    twice, and a bare sum (He et al. 2016, arXiv:1603.05027).
    """

    def __init__(self, channels: int, style: Style = Style()) -> None:
        """Make a block."""
        super().__init__()
        first, second = convolution(channels, channels), convolution(channels, channels)
        if style.preactivation:
            # Not in place where it is the first: the sum needs the block's input as it came.
            opening = style.activate(inplace=style.normalisation != "none")
            body = [*style.normalise(channels), opening, first]
            body += [*style.normalise(channels), style.activate(), second]
        else:
            body = [first, *style.normalise(channels), style.activate(), second, *style.normalise(channels)]
        self.body = nn.Sequential(*body)
        self.activation = nn.Identity() if style.preactivation else style.activate()

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        return self.activation(self.body(x) + x)  # type: ignore[no-any-return]

    def start_as_identity(self) -> None:
        """Zero the last layer, so that the sum is the input (Goyal et al. 2017, arXiv:1706.02677)."""
        last = self.body[-1]
        assert isinstance(last, nn.Conv2d | nn.BatchNorm2d | nn.GroupNorm) and last.bias is not None
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)


class Dropout(nn.Dropout):
    """Dropout (Srivastava et al. 2014) whose random numbers cost less on CPUs: any shape -> the same shape.

    PyTorch draws one number an element there, in one thread: a fifth of a small network's training step. Here
    four elements share the bits of one draw, so the ratio is rounded to a multiple of 1/65536.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Zero a share `p` of the elements in training, and scale up the others."""
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        dropped = min(round(self.p * 2**16), 2**16 - 1)
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        kept = draws.view(torch.int16)[: x.numel()] >= dropped - 2**15
        # Of the input's memory format, which the next convolution wants.
        factor = torch.empty_like(x)
        factor.copy_(kept.as_strided(factor.shape, factor.stride())).mul_(2**16 / (2**16 - dropped))
        return x * factor


class SCSE(nn.Module):
    """Weigh the channels and, beside that, the pixels, and add both: (n, c, h, w) -> the same shape.

    Source: Roy et al. 2018, arXiv:1803.02579, with its reduction of 2.
    """

    def __init__(self, channels: int) -> None:
        """Make the two gates."""
        super().__init__()
        squeezed = max(1, channels // 2)
        self.channels = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, squeezed, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(squeezed, channels, 1),
            nn.Sigmoid(),
        )
        self.pixels = nn.Sequential(nn.Conv2d(channels, 1, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """Apply both gates."""
        return x * (self.channels(x) + self.pixels(x))  # type: ignore[no-any-return]


class Hypercolumn(nn.Module):
    """Join the decoder's features of all levels at the finest one's size (Hariharan et al. 2015).

    Each coarser level is brought to the finest one's channels, enlarged and concatenated; a 3x3 convolution
    brings the column back to those channels. (Without it, a 1x1 head on the column would be no more than a
    sum of one head a level.)
    """

    def __init__(self, widths: list[int], style: Style) -> None:
        """Make the layers for features of these channels, coarsest first."""
        super().__init__()
        outputs = widths[-1]
        self.reduce = nn.ModuleList(nn.Conv2d(w, outputs, 1) for w in widths[:-1])
        self.mix = nn.Sequential(
            convolution(outputs * len(widths), outputs), *style.normalise(outputs), style.activate()
        )

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Map features (n, c_i, h_i, w_i), coarsest first, to one of the last one's shape."""
        size = levels[-1].shape[2:]
        column = [lay_over(r(x), size) for r, x in zip(self.reduce, levels[:-1], strict=True)]
        return self.mix(torch.cat([*column, levels[-1]], dim=1))  # type: ignore[no-any-return]


def plain_stage(inputs: int, outputs: int, style: Style) -> nn.Module:
    """Make the U-Net's level: two 3x3 convolutions, each with normalisation and activation."""
    return nn.Sequential(
        convolution(inputs, outputs),
        *style.normalise(outputs),
        style.activate(),
        convolution(outputs, outputs),
        *style.normalise(outputs),
        style.activate(),
        *style.attend(outputs),
    )


def residual_stage(inputs: int, outputs: int, style: Style, blocks: int) -> nn.Module:
    """Make the ResUNet's level: a plain 3x3 convolution, then residual blocks."""
    # A sum of preactivated blocks is bare: what comes next expects it normalised and activated.
    closing = [*style.normalise(outputs), style.activate()] if style.preactivation else []
    return nn.Sequential(
        convolution(inputs, outputs),
        *(ResidualBlock(outputs, style) for _ in range(blocks)),
        *closing,
        *style.attend(outputs),
    )


def convolution(inputs: int, outputs: int) -> nn.Conv2d:
    """Make a 3x3 convolution that keeps height and width."""
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def enlarge(x: Tensor, factor: int) -> Tensor:
    """Enlarge maps (n, c, h, w) bilinearly by a whole factor."""
    return functional.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def lay_over(x: Tensor, size: torch.Size) -> Tensor:
    """Enlarge a coarser level's maps (n, c, h, w) by the power of two that they were halved by, to this size.

    Where halving left an odd row or column out, or added one, the level does not end where the tile ends:
    stretched to the tile's size, its features would lie several pixels beside what they stand for.
    """
    kind = x.dtype
    x = enlarge(x, 2 ** round(math.log2(size[0] / x.shape[2])))[:, :, : size[0], : size[1]]
    x = x.to(kind)  # a GPU's autocast enlarges in float32, and the column of all levels would take it over
    missing = (0, size[1] - x.shape[3], 0, size[0] - x.shape[2])
    return functional.pad(x, missing, mode="replicate") if any(missing) else x


def pad(images: Tensor, pixels: int, mode: Literal["edge", "reflect"]) -> Tensor:
    """Add so many rows and columns to images (n, c, h, w), half on each side; an odd one at the end."""
    before, after = pixels // 2, pixels - pixels // 2
    sides = (before, after, before, after)
    return functional.pad(images, sides, mode="replicate" if mode == "edge" else "reflect")


def crop(images: Tensor, height: int, width: int) -> Tensor:
    """Undo `pad`: the middle of images (n, c, h, w)."""
    top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
    return images[:, :, top : top + height, left : left + width]
