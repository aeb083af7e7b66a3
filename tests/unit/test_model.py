import math
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from saltray.config import ModelConfig, UserError
from saltray.network.layers import SCSE, Dropout, Hypercolumn, ResidualBlock, Style, crop, lay_over, pad
from saltray.network.model import EncoderDecoder, Input, build_model, count_parameters

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


@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.5])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dropout_zeroes_each_element_by_itself_and_scales_up_the_others(
    ratio: float, layout: torch.memory_format
) -> None:
    torch.manual_seed(0)
    x = (1 + torch.rand(7, 3, 101, 101)).contiguous(memory_format=layout).requires_grad_()
    y = Dropout(ratio).train()(x)
    y.sum().backward()
    assert x.grad is not None
    dropped = (y == 0).double()
    assert y.is_contiguous(memory_format=layout)
    torch.testing.assert_close(
        y, x.detach() * (1 - dropped) / (1 - ratio), rtol=1e-4, atol=0, check_dtype=False
    )
    torch.testing.assert_close(x.grad, (1 - dropped) / (1 - ratio), rtol=1e-4, atol=0, check_dtype=False)
    # Five standard deviations of the binomial distribution; of a product of two independent ones.
    drops = dropped.permute(0, 2, 3, 1) if layout == torch.channels_last else dropped
    flat = drops.flatten() - ratio
    assert abs(flat.mean()) < 5 * (ratio * (1 - ratio) / len(flat)) ** 0.5
    for lag in (1, 2, 3, 4):
        assert abs((flat[lag:] * flat[:-lag]).mean()) < 5 * ratio * (1 - ratio) / len(flat) ** 0.5, lag


def test_dropout_takes_what_is_not_contiguous_and_leaves_evaluation_alone() -> None:
    x = torch.rand(5, 4, 9, 9)[::2, 1:, ::3]
    assert Dropout(0.5).train()(x).shape == x.shape
    assert Dropout(0.5).eval()(x) is x


@pytest.mark.parametrize("architecture", BOTH)
def test_evaluation_is_deterministic_and_tiles_are_independent(architecture: Architecture) -> None:
    model, images = tiny(architecture, dropout=0.5), torch.rand(3, 1, 101, 101)
    with torch.no_grad():
        together, alone = model(images), model(images[1:2])
    torch.testing.assert_close(alone[0], together[1], rtol=1e-4, atol=1e-5)
    model.train()
    assert not torch.equal(model(images), model(images))


def test_weights_start_at_hes_deviation_and_biases_at_zero() -> None:
    torch.manual_seed(0)
    model = build_model(ModelConfig(filters=16, levels=2))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.numel() > 2000 and "upsample" not in name:
            deviation = math.sqrt(2 / parameter[0].numel())
            assert parameter.std().item() == pytest.approx(deviation, rel=0.1), name


@pytest.mark.parametrize("size", [50, 25, 12, 6, 51, 26, 13, 7])  # by pooling; by TensorFlow's "SAME"
def test_a_coarser_level_is_laid_over_the_pixels_that_it_stands_for(size: int) -> None:
    step = 2 ** round(math.log2(101 / size))
    places = torch.stack(torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij"))[None]
    level = functional.avg_pool2d(places, step)[:, :, :size, :size]  # where its features are from
    over = lay_over(level, torch.Size((101, 101)))
    assert over.shape == (1, 2, 101, 101)
    inside = slice(step // 2, min(size * step, 101) - step // 2)
    torch.testing.assert_close(over[:, :, inside, inside], places[:, :, inside, inside])
    if size * step < 101:
        last = over[..., size * step - 1 :]
        assert torch.equal(last, last[..., :1].expand_as(last))


def test_the_same_seed_builds_the_same_network_channels_last() -> None:
    first, second = tiny("resunet").state_dict(), tiny("resunet").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    kernels = [w for name, w in first.items() if w.ndim == 4]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in kernels)


def built(**options: Any) -> EncoderDecoder:
    torch.manual_seed(0)
    return build_model(ModelConfig.model_validate({"filters": 4, "levels": 2, "dropout": 0.0} | options))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"architecture": "resunet"},
    {"normalisation": "batch"},
    {"normalisation": "group", "activation": "elu"},
    {"architecture": "resunet", "normalisation": "none", "activation": "silu"},
    {"architecture": "resunet", "preactivation": True, "zero_init_residual": True},
    {"architecture": "resunet", "preactivation": True, "normalisation": "none"},
    {"scse": True},
    {"hypercolumn": True, "normalisation": "batch"},
    {"deep_supervision": True},
    {"coordinates": True, "depth": True},
    {"padded_size": 112, "padding": "edge"},
    {"padded_size": 128, "upscale": 2},
    {"max_filters": 5},
    {"encoder": "efficientnet_lite0", "levels": 5, "depth": True},
    {"encoder": "efficientnet_lite2", "levels": 3, "padded_size": 128, "hypercolumn": True, "scse": True},
    {
        "encoder": "efficientnet_lite0",
        "levels": 3,
        "upscale": 2,
        "hypercolumn": True,
        "deep_supervision": True,
    },
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_trains_all_parameters_and_tells_each_tile_by_itself(options: dict[str, Any]) -> None:
    model, images, z = built(**options), torch.rand(3, 1, 101, 101), torch.tensor([50.0, 400.0, 959.0])
    outputs = model(images, z)
    tensors = (
        [outputs] if isinstance(outputs, Tensor) else [outputs.logits, *outputs.auxiliary, outputs.empty]
    )
    sum(t.square().mean() for t in tensors).backward()  # type: ignore[union-attr]
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    model.eval()
    with torch.inference_mode():
        together, alone = model(images, z), model(images[1:2], z[1:2])
    assert isinstance(together, Tensor) and together.shape == (3, 101, 101)
    torch.testing.assert_close(alone[0], together[1], rtol=1e-3, atol=1e-4)


def test_deeply_supervised_networks_have_a_head_a_level_and_train_on_them_alone() -> None:
    model = built(deep_supervision=True, levels=3, padded_size=112)
    outputs = model(torch.rand(2, 1, 101, 101))
    assert [level.shape for level in outputs.auxiliary] == [(2, 101, 101)] * 2
    assert outputs.empty.shape == (2,)
    plain = built(levels=3, padded_size=112)
    missing, unexpected = plain.load_state_dict(model.state_dict(), strict=False)
    assert missing == [] and {name.split(".")[0] for name in unexpected} == {"auxiliary", "empty"}
    images = torch.rand(2, 1, 101, 101)
    assert torch.equal(plain.eval()(images), model.eval()(images))


@pytest.mark.parametrize(("mode", "numpys"), [("edge", "edge"), ("reflect", "reflect")])
@pytest.mark.parametrize("size", [112, 128])
def test_padding_is_numpys_and_its_crop_the_tile(
    mode: Literal["edge", "reflect"], numpys: Any, size: int
) -> None:
    tiles, border = torch.rand(2, 1, 101, 101), size - 101
    padded = pad(tiles, border, mode)
    sides = (border // 2, border - border // 2)
    expected = np.pad(tiles.numpy(), ((0, 0), (0, 0), sides, sides), mode=numpys)
    np.testing.assert_array_equal(padded.numpy(), expected)
    assert torch.equal(crop(padded, 101, 101), tiles)


def test_what_the_network_sees_beside_the_image() -> None:
    images, z = torch.rand(2, 1, 101, 101), torch.tensor([50.0, 959.0])
    x = Input(coordinates=True, depth=True, border=11).make(images, z)
    assert x.shape == (2, 3, 112, 112)
    torch.testing.assert_close(x[:, 1, 0], torch.full((2, 112), -1.0))
    torch.testing.assert_close(x[:, 1, -1], torch.full((2, 112), 1.0))
    torch.testing.assert_close(x[:, 1, 37, 5], torch.full((2,), -1 + 2 * 37 / 111))
    torch.testing.assert_close(x[:, 2], torch.tensor([0.05, 0.959])[:, None, None].expand(2, 112, 112))
    with pytest.raises(UserError, match="model/depth"):
        built(depth=True)(images)


def test_twice_enlarged_and_reduced_a_smooth_image_is_itself() -> None:
    rows = torch.linspace(0, 1, 101)[:, None].expand(2, 1, 101, 101)
    prepare = Input(upscale=2, border=27)
    x = prepare.make(rows, None)
    assert x.shape == (2, 1, 256, 256)
    inner = prepare.unmake(x, 101, 101)[:, 1:-1]  # reflection bends it at the very border
    torch.testing.assert_close(inner, rows.squeeze(1)[:, 1:-1], rtol=0, atol=1e-5)


def test_a_decoder_on_an_enlarged_tile_ends_at_the_tiles_own_size() -> None:
    model = built(encoder="efficientnet_lite0", levels=4, upscale=2)
    sizes = list[int]()
    for stage in model.decoder:
        stage.register_forward_hook(lambda _, __, output: sizes.append(output.shape[2]))
    model(torch.rand(2, 1, 101, 101))
    assert sizes == [26, 51, 101]
    with pytest.raises(UserError, match="upscale 2 under efficientnet_lite0 needs two levels or more"):
        ModelConfig.from_dict({"encoder": "efficientnet_lite0", "levels": 1, "upscale": 2})


@pytest.mark.parametrize("preactivation", [False, True])
def test_zero_initialised_blocks_are_the_identity(preactivation: bool) -> None:
    for normalisation in ("none", "batch", "group"):
        block = ResidualBlock(4, Style(normalisation, preactivation=preactivation))
        block.start_as_identity()
        x = torch.randn(2, 4, 5, 5)
        expected = x if preactivation else x.clamp(min=0)
        torch.testing.assert_close(block(x.clone()), expected)
    model = built(architecture="resunet", zero_init_residual=True)
    last = [value for name, value in model.state_dict().items() if name.endswith("body.4.weight")]
    assert len(last) == 10 and not any(value.any() for value in last)


def test_preactivated_block_agrees_with_its_formula() -> None:
    torch.manual_seed(0)
    block, x = ResidualBlock(3, Style("none", "elu", preactivation=True)), torch.randn(2, 3, 6, 5)
    state, before = dict(block.state_dict()), x.clone()
    y = conv(state, "body.1", functional.elu(x))
    expected = x + conv(state, "body.3", functional.elu(y))
    torch.testing.assert_close(block(x), expected)
    assert torch.equal(x, before)


def test_scse_agrees_with_its_formula() -> None:
    torch.manual_seed(0)
    gate, x = SCSE(6), torch.randn(2, 6, 5, 4)
    state = {name: value.squeeze() for name, value in gate.state_dict().items()}
    mean = x.mean(dim=(2, 3))
    squeezed = (mean @ state["channels.1.weight"].T + state["channels.1.bias"]).clamp(min=0)
    channels = torch.sigmoid(squeezed @ state["channels.3.weight"].T + state["channels.3.bias"])
    pixels = torch.sigmoid(torch.einsum("c,nchw->nhw", state["pixels.0.weight"], x) + state["pixels.0.bias"])
    torch.testing.assert_close(gate(x), x * channels[:, :, None, None] + x * pixels[:, None])


def test_hypercolumn_agrees_with_its_formula() -> None:
    torch.manual_seed(0)
    column, levels = Hypercolumn([6, 3], Style("none")), [torch.randn(2, 6, 4, 4), torch.randn(2, 3, 8, 8)]
    state = dict(column.state_dict())
    coarse = functional.conv2d(levels[0], state["reduce.0.weight"], state["reduce.0.bias"])
    coarse = functional.interpolate(coarse, scale_factor=2, mode="bilinear")
    expected = conv(state, "mix.0", torch.cat([coarse, levels[1]], dim=1)).clamp(min=0)
    torch.testing.assert_close(column(levels), expected)


def test_widths_double_up_to_the_largest() -> None:
    model = built(filters=4, levels=4, max_filters=12)
    assert [m.out_channels for m in model.upsample] == [12, 12, 8, 4]


def test_group_normalisation_takes_groups_that_divide_the_channels() -> None:
    groups = {c: Style("group").normalise(c)[0].num_groups for c in (1, 3, 12, 16, 20)}
    assert groups == {1: 1, 3: 1, 12: 4, 16: 8, 20: 4}
