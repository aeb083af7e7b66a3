import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
import yaml
from PIL import Image
from torch import nn

from saltray import config
from saltray.config import DEBUG, ModelConfig, Split
from saltray.contest import rle
from saltray.ensembles import ensemble_bundle
from saltray.network.model import build_model, to_input
from saltray.prediction import bundle, inference
from saltray.records import run
from saltray.records.settings import Settings
from saltray.training import checkpoint

METRICS = {
    "best_map": 0.712345,
    "best_epoch": 2,
    "history": [0.5, 0.712345],
    "trial": 3,
    "threshold": 0.46,
    "tta": False,
    "min_area": 0,
    "validation_map": 0.734567,
    "tiles": {"training": 3200, "validation": 800, "empty_score": 0.3905},
}


def make_bundle(folder: Path, config: ModelConfig = DEBUG.model, seed: int = 0) -> Path:
    """Make a checkpoint whose BatchNorm statistics are no longer the initial ones."""
    torch.manual_seed(seed)
    model = build_model(config).train()
    for _ in range(3):
        model(torch.rand(4, 1, 101, 101), torch.rand(4) * 900)
    folder.mkdir(exist_ok=True)
    checkpoint.save(folder, model.state_dict(), DEBUG.model_copy(update={"model": config}), METRICS)
    return folder


def make_run(folder: Path, split: Split = "coverage") -> Path:
    settings = Settings(data="/surveys/gulf {2}", space="space.py", split=split, trials=3, epochs=2, seed=7)
    run.write_settings(folder, settings, "0123abcd")
    return folder


def infer(file: Path, **inputs: npt.NDArray[np.float32]) -> Any:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(["logits"], inputs)[0]


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(filters=4),
        ModelConfig(architecture="resunet", filters=4, residual_blocks=1),
        ModelConfig(architecture="resunet", filters=2, levels=5, residual_blocks=1),
        ModelConfig(filters=3, levels=1, depth=True, coordinates=True, padded_size=112),
        ModelConfig(
            architecture="resunet",
            filters=4,
            levels=3,
            preactivation=True,
            normalisation="group",
            activation="silu",
            scse=True,
            hypercolumn=True,
            deep_supervision=True,
            padded_size=128,
            upscale=2,
        ),
        ModelConfig(encoder="efficientnet_lite0", filters=4, max_filters=16, padded_size=128),
    ],
)
def test_onnx_gives_what_torch_gives(tmp_path: Path, config: ModelConfig) -> None:
    folder = make_bundle(tmp_path, config)
    bundle.export_onnx(folder)
    model = checkpoint.load_model(folder)
    for tiles in (1, 5):
        pixels = np.random.default_rng(tiles).integers(0, 256, (tiles, 101, 101), np.uint8)
        z = np.linspace(50, 959, tiles, dtype=np.float32)
        with torch.inference_mode():
            images = to_input(torch.from_numpy(pixels), torch.device("cpu"))
            expected = model(images, torch.from_numpy(z)).numpy()
            exact = model.double()(images.double(), torch.from_numpy(z).double()).numpy()
            model.float()
        inputs = {"image": pixels[:, None].astype(np.float32) / np.float32(255)}
        inputs |= {"depth": z} if config.depth else {}
        logits = infer(folder / bundle.ONNX, **inputs)
        assert logits.shape == expected.shape == (tiles, 101, 101)
        assert logits.dtype == np.float32
        # Of the largest logit; both round in float32, PyTorch the more coarsely in some layers.
        largest = max(1, np.abs(exact).max())
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-3 * largest)
        np.testing.assert_allclose(logits, exact, rtol=0, atol=3e-5 * largest)


def test_onnx_is_valid_and_knows_its_threshold(tmp_path: Path) -> None:
    bundle.export_onnx(make_bundle(tmp_path))
    file = tmp_path / bundle.ONNX
    onnx.checker.check_model(onnx.load(file), full_check=True)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (image,), (output,) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.type, image.shape[1:]) == ("image", "tensor(float)", [1, 101, 101])
    assert (output.name, output.type, output.shape[1:]) == ("logits", "tensor(float)", [101, 101])
    assert isinstance(image.shape[0], str) and image.shape[0] == output.shape[0]  # any number of tiles
    known = session.get_modelmeta().custom_metadata_map
    assert known == {"saltray.threshold": "0.46", "saltray.tta": "False", "saltray.min_area": "0"}


def test_what_cannot_be_exported_is_told_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fickle(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, 0] if x.sum() > 0 else -x[:, 0]

    make_bundle(tmp_path)
    monkeypatch.setattr(checkpoint, "load_model", lambda _: Fickle())
    with pytest.raises(bundle.ExportError, match=r"model\.onnx: not written: "):
        bundle.export_onnx(tmp_path)
    assert not (tmp_path / bundle.ONNX).exists()


def test_the_card_tells_scores_data_and_limits(tmp_path: Path) -> None:
    folder = make_bundle(make_run(tmp_path) / "best.new")
    bundle.write_card(folder)
    card = (folder / bundle.CARD).read_text()
    _, front, body = card.split("---\n", 2)
    described = yaml.safe_load(front)
    (result,) = described["model-index"][0]["results"]
    assert described["pipeline_tag"] == "image-segmentation"
    assert (result["dataset"]["name"], result["metrics"][0]["value"]) == ("gulf {2}", 0.7123)
    for words in (
        "| at probability 0.50 | 0.7123 |",
        "| as this model is used: at probability 0.46 | 0.7346 |",
        "| all tiles predicted empty, for comparison | 0.3905 |",
        "3,200 training and 800 validation tiles of `gulf {2}`",
        "`0123abcd`",
        "seed 7",
        "epoch 2 of trial 3",
        f"torch {torch.__version__}",
        "chosen on these same validation tiles",
    ):
        assert words in body, words
    assert "lie beside no training tile" not in body  # nothing is known of such
    assert "/surveys" not in body  # nobody else's folder
    assert json.loads(re.findall(r"```json\n(.*?)```", body, re.S)[0]) == DEBUG.to_dict()
    assert "onnx" not in card.lower()  # of a file that is not there


def test_the_card_tells_of_all_sessions_that_may_have_trained_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_bundle(make_run(tmp_path) / "best.new")
    settings = run.read_settings(folder.parent)
    monkeypatch.setattr(sys, "argv", ["tune", "--resume", "my runs", "--ensemble-with", ""])
    run.write_settings(folder.parent, settings, "0123abcd")
    bundle.write_card(folder)
    first, second = (session["command"] for session in run.read(folder.parent)["sessions"])
    assert second.endswith("--resume 'my runs' --ensemble-with ''")  # as it can be pasted
    body = (folder / bundle.CARD).read_text()
    assert f"- command: `{first}`; then `{second}`\n" in body
    assert body.count(f"torch {torch.__version__}") == 1  # the same in both


def test_the_card_tells_the_score_away_from_the_training_tiles(tmp_path: Path) -> None:
    folder = make_bundle(make_run(tmp_path) / "best.new")
    bundle.add_metrics(folder, {"lone": {"tiles": 1234, "map": 0.70106}})
    bundle.write_card(folder)
    lines = (folder / bundle.CARD).read_text().splitlines()
    place = lines.index("| as this model is used: at probability 0.46 | 0.7346 |")
    assert lines[place + 1].endswith(
        "1,234 that lie beside no training tile, as far as edges tell | 0.7011 |"
    )
    assert lines[place + 2].startswith("| all tiles predicted empty")


@pytest.mark.parametrize(("split", "flatters"), [("coverage", True), ("neighbours", False)])
def test_the_cards_tell_what_the_split_does_with_neighbours(
    tmp_path: Path, split: Split, flatters: bool
) -> None:
    folder = make_bundle(make_run(tmp_path, split) / "best.new")
    bundle.write_card(folder)
    best = (folder / bundle.CARD).read_text()
    facts: dict[str, Any] = {"models": 1, "folds": 5, "in_sample": 0.7, "cross_fitted": 0.6, "spread": 0.1}
    facts |= {"candidates": [{"name": "trial 3", "weight": 1.0, "by_fold": [0.6, 0.7]}]}
    bundle.add_metrics(folder, facts)
    ensemble_bundle.write_card(folder)
    ensemble = (folder / bundle.CARD).read_text()
    bundle.add_metrics(folder, {"lone": {"tiles": 2951, "map": 0.59876}})
    ensemble_bundle.write_card(folder)
    added = {*(folder / bundle.CARD).read_text().splitlines()} - {*ensemble.splitlines()}
    assert added == {
        "| likewise, on those 2,951 that lie beside no tile of their models' training | 0.5988 |"
    }
    for card in (best, ensemble):
        assert f"- {config.NEIGHBOURS[split]}" in " ".join(card.split())
        assert ("flatters the score on the other" in " ".join(card.split())) == flatters
    assert ("coverage and keeping neighbours together, seed 7" in " ".join(best.split())) == (not flatters)


@pytest.mark.parametrize(("tta", "min_area", "depth"), [(False, 0, False), (True, 3000, True)])
def test_the_cards_own_lines_give_the_models_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tta: bool, min_area: int, depth: bool
) -> None:
    config = DEBUG.model.model_copy(update={"depth": depth})
    folder = make_bundle(make_run(tmp_path) / "best.new", config, seed=1 if depth else 5)
    bundle.add_metrics(folder, {"tta": tta, "min_area": min_area})
    bundle.export_onnx(folder)
    bundle.write_card(folder)
    elsewhere = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    pixels = np.random.default_rng(0).integers(0, 256, (101, 101), np.uint8)
    Image.fromarray(np.stack([pixels] * 3, axis=2)).save(elsewhere / "tile.png")
    (program,) = re.findall(r"```python\n(.*?)```", (elsewhere / bundle.CARD).read_text(), re.S)
    monkeypatch.chdir(elsewhere)
    names: dict[str, Any] = {}
    exec(program, names)
    segmenter = inference.Segmenter(inference.load_models(folder), 1, inference.stored_postprocessing(folder))
    code = segmenter({"id": np.array(["a"]), "image": pixels[None], "z": np.full(1, 500, np.float32)})["rle"]
    expected = rle.decode(code[0]) > 0
    assert expected.any() and not expected.all()
    assert (names["salt"] == expected).mean() > 0.999
    if min_area:
        exec(program.replace(f">= {min_area}", ">= 9999"), names)
        assert not names["salt"].any()


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_bundle_takes_an_earlier_ones_place_in_whole(tmp_path: Path) -> None:
    for seed in (1, 2):
        source = make_bundle(tmp_path / f"checkpoint-{seed}", seed=seed)
        (source / checkpoint.TRAINING).write_bytes(b"large")
        fresh = bundle.stage(tmp_path, str(source))
        bundle.add_metrics(fresh, {"seed": seed})
        best = bundle.publish(fresh)
        assert checkpoint.load_metrics(best) == METRICS | {"seed": seed}
        assert set(contents(best)) == {"weights.safetensors", "config.json", "metrics.json"}
        assert (best / checkpoint.WEIGHTS).read_bytes() == (source / checkpoint.WEIGHTS).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("best")) == ["best"]


@pytest.mark.parametrize("stopped_at", [1, 2, 3, 4])
def test_cut_off_anywhere_the_next_session_finds_a_whole_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_at: int
) -> None:
    """Publishing makes room, puts the old one aside, the new one in, and takes the old one away."""
    sources = [make_bundle(tmp_path / f"checkpoint-{seed}", seed=seed) for seed in (1, 2)]
    earlier = contents(bundle.publish(bundle.stage(tmp_path, str(sources[0]))))
    fresh = bundle.stage(tmp_path, str(sources[1]))
    later, steps = contents(fresh), 0

    def cut(step: Any) -> Any:
        def stopping(*arguments: Any, **options: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == stopped_at:
                raise KeyboardInterrupt
            return step(*arguments, **options)

        return stopping

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", cut(Path.rename))
        patch.setattr(shutil, "rmtree", cut(shutil.rmtree))
        with pytest.raises(KeyboardInterrupt):
            bundle.publish(fresh)
    bundle.stage(tmp_path, str(sources[1]))
    assert contents(tmp_path / "best") == (later if stopped_at == 4 else earlier)
    bundle.publish(tmp_path / "best.new")
    assert contents(tmp_path / "best") == later
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("best")) == ["best"]
