import math
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from saltray.config import ModelConfig
from saltray.model import EncoderDecoder, ResidualBlock, build_model, count_parameters

Architecture = Literal["unet", "resunet"]
BOTH: list[Architecture] = ["unet", "resunet"]
State = dict[str, Tensor]


def tiny(architecture: Architecture, levels: int = 2, dropout: float = 0.0) -> EncoderDecoder:
    torch.manual_seed(0)
    model = build_model(ModelConfig(architecture=architecture, filters=2, levels=levels, dropout=dropout))
    for module in model.modules():  # else a forgotten bias or BatchNorm statistic would not show
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            assert module.bias is not None
            nn.init.normal_(module.bias, std=0.3)
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def conv(state: State, name: str, x: Tensor) -> Tensor:
    return functional.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)


def norm(state: State, name: str, x: Tensor) -> Tensor:
    mean, var, scale, shift = (
        state[f"{name}.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (var + 1e-5).sqrt() * scale + shift


def residual(state: State, name: str, x: Tensor) -> Tensor:
    y = norm(state, f"{name}.1", conv(state, f"{name}.0", x)).clamp(min=0)
    y = norm(state, f"{name}.4", conv(state, f"{name}.3", y))
    return (x + y).clamp(min=0)


def level(architecture: Architecture, state: State, name: str, x: Tensor) -> Tensor:
    x = conv(state, f"{name}.0", x)
    if architecture == "unet":
        return conv(state, f"{name}.2", x.clamp(min=0)).clamp(min=0)
    return residual(state, f"{name}.2.body", residual(state, f"{name}.1.body", x))


def keras_transposed(x: Tensor, weight: Tensor, bias: Tensor, size: int) -> Tensor:
    # The gradient of the strided convolution, of which Keras' "same" pads an even input at its end.
    large = torch.zeros((len(x), weight.shape[1], size, size), dtype=x.dtype, requires_grad=True)
    padded = functional.pad(large, (0, 1, 0, 1)) if size % 2 == 0 else large
    small = functional.conv2d(padded, weight, stride=2)
    (gradient,) = torch.autograd.grad(small, large, grad_outputs=x)
    return gradient + bias[:, None, None]


def reference(architecture: Architecture, state: State, x: Tensor, levels: int) -> Tensor:
    skips = []
    for i in range(levels):
        skips.append(level(architecture, state, f"encoder.{i}", x))
        x = functional.max_pool2d(skips[-1], 2)
    x = level(architecture, state, "bottom", x)
    for i, skip in enumerate(reversed(skips)):
        weight, bias = state[f"upsample.{i}.weight"], state[f"upsample.{i}.bias"]
        x = keras_transposed(x, weight, bias, skip.shape[-1])
        x = level(architecture, state, f"decoder.{i}", torch.cat([x, skip], dim=1))
    head = torch.einsum("oc,nchw->nohw", state["head.weight"][:, :, 0, 0], x)
    return head[:, 0] + state["head.bias"]


@pytest.mark.parametrize(
    ("architecture", "filters", "parameters"),
    [
        ("unet", 8, 540_073),
        ("unet", 16, 2_158_417),
        ("unet", 32, 8_629_921),
        ("resunet", 8, 1_280_249),
        ("resunet", 16, 5_111_025),
        ("resunet", 32, 20_424_161),
    ],
)
def test_parameter_counts_are_the_seeds(architecture: Architecture, filters: int, parameters: int) -> None:
    with torch.device("meta"):  # shapes without numbers
        model = build_model(ModelConfig(architecture=architecture, filters=filters))
    assert count_parameters(model) == parameters


def test_frozen_parameters_are_not_counted() -> None:
    model = tiny("unet")
    before = count_parameters(model)
    model.head.requires_grad_(False)
    assert count_parameters(model) == before - 3


@pytest.mark.parametrize("architecture", BOTH)
@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_forward_agrees_with_one_written_by_hand(architecture: Architecture, levels: int) -> None:
    # Four levels upsample 6 -> 12 ("same"), 12 -> 25 ("valid"), 25 -> 50 ("same") and 50 -> 101 ("valid").
    model = tiny(architecture, levels).double()
    generator = torch.Generator().manual_seed(1)
    images = torch.rand((2, 1, 101, 101), generator=generator, dtype=torch.float64)
    expected = reference(architecture, {k: v.detach() for k, v in model.state_dict().items()}, images, levels)
    with torch.no_grad():
        logits = model(images)
    assert logits.shape == (2, 101, 101)
    assert logits.std() > 1e-3
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("architecture", BOTH)
@pytest.mark.parametrize("tiles", [1, 3])
@pytest.mark.parametrize("levels", [1, 4, 5])
def test_shape_in_training_mode(architecture: Architecture, tiles: int, levels: int) -> None:
    model = tiny(architecture, levels, dropout=0.5).train()
    logits = model(torch.rand(tiles, 1, 101, 101))
    assert logits.shape == (tiles, 101, 101)
    assert logits.dtype == torch.float32


def test_residual_block_agrees_with_its_formula_in_training() -> None:
    torch.manual_seed(0)
    block, x = ResidualBlock(3), torch.randn(4, 3, 6, 5)
    before = x.clone()

    def normalised(y: Tensor) -> Tensor:
        return (y - y.mean((0, 2, 3), keepdim=True)) / (y.var((0, 2, 3), False, keepdim=True) + 1e-5).sqrt()

    state = dict(block.state_dict())
    y = normalised(conv(state, "body.0", x)).clamp(min=0)
    expected = (x + normalised(conv(state, "body.3", y))).clamp(min=0)
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(x, before)  # the sum and the ReLU in place do not reach the input


@pytest.mark.parametrize("blocks", [1, 3])
def test_residual_blocks_are_as_many_as_configured(blocks: int) -> None:
    model = build_model(ModelConfig(architecture="resunet", filters=1, levels=3, residual_blocks=blocks))
    assert sum(isinstance(module, ResidualBlock) for module in model.modules()) == 7 * blocks


@pytest.mark.parametrize("architecture", BOTH)
def test_dropout_follows_every_pool_and_every_concatenation(architecture: Architecture) -> None:
    model, seen = tiny(architecture, levels=4, dropout=0.4), []

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Dropout)
        seen.append((module.p, *inputs[0].shape[1:3]))

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_pre_hook(record)
    model(torch.rand(1, 1, 101, 101))
    pooled = [(0.2, 2, 50), (0.4, 4, 25), (0.4, 8, 12), (0.4, 16, 6)]
    joined = [(0.4, 32, 12), (0.4, 16, 25), (0.4, 8, 50), (0.4, 4, 101)]
    assert seen == pooled + joined


@pytest.mark.parametrize("architecture", BOTH)
def test_evaluation_is_deterministic_and_tiles_are_independent(architecture: Architecture) -> None:
    model, images = tiny(architecture, dropout=0.5), torch.rand(3, 1, 101, 101)
    with torch.no_grad():
        together, alone = model(images), model(images[1:2])
    torch.testing.assert_close(alone[0], together[1], rtol=1e-4, atol=1e-5)
    model.train()
    assert not torch.equal(model(images), model(images))


@pytest.mark.parametrize("architecture", BOTH)
def test_every_parameter_gets_a_gradient(architecture: Architecture) -> None:
    model = tiny(architecture, levels=4).train()
    model(torch.rand(2, 1, 101, 101)).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_weights_start_at_hes_deviation_and_biases_at_zero() -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(filters=16, levels=2))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.numel() > 2000 and "upsample" not in name:
            deviation = math.sqrt(2 / parameter[0].numel())
            assert parameter.std().item() == pytest.approx(deviation, rel=0.1), name


def test_the_same_seed_builds_the_same_network_channels_last() -> None:
    first, second = tiny("resunet").state_dict(), tiny("resunet").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    kernels = [w for name, w in first.items() if w.ndim == 4]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in kernels)
