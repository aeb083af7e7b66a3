"""Postprocessing on Ray Data's actors, against the same by hand."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from saltray import demo
from saltray.config import TILE, ModelConfig, TrialConfig
from saltray.contest import metrics, rle
from saltray.data import dataset
from saltray.network.model import build_model
from saltray.prediction import inference, validation
from saltray.prediction.postprocessing import Postprocessing
from saltray.sessions import outcome
from saltray.training import checkpoint

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.write(tmp_path_factory.mktemp("demo"), demo.files(train=24, test=4, seed=3))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights that reads the depth, and calls some pixels of most tiles salt."""
    torch.manual_seed(4)
    config = TrialConfig(model=ModelConfig(filters=2, levels=1, dropout=0, depth=True))
    weights = build_model(config.model).state_dict()
    weights["head.bias"] += 0.3
    folder = tmp_path_factory.mktemp("model")
    checkpoint.save(folder, weights, config, {"threshold": 0.62, "history": [0.1]})
    return folder


def by_hand(folder: Path, images: torch.Tensor, z: torch.Tensor, tta: bool) -> torch.Tensor:
    """Return probabilities of salt."""
    network, pixels = checkpoint.load_model(folder), images[:, None] / 255
    with torch.inference_mode():
        salt = torch.sigmoid(network(pixels, z))
        mirrored = torch.sigmoid(network(pixels.flip(3), z)).flip(2)
    return (salt + mirrored) / 2 if tta else salt


@pytest.mark.parametrize("tta", [False, True])
def test_masks_are_as_by_hand(model: Path, data: Path, tta: bool) -> None:
    tiles, _ = dataset.decode(dataset.read_train(dataset.open_folder(str(data))))
    rows = next(iter(tiles.iter_batches(batch_size=None)))
    salt = by_hand(model, torch.tensor(rows["image"]), torch.tensor(rows["z"]), tta).numpy()
    cut = float(np.median(salt))
    masks = salt > cut
    least = int(np.median(masks.sum(axis=(1, 2))))
    masks[masks.sum(axis=(1, 2)) < least] = False
    assert 0 < masks.any(axis=(1, 2)).sum() < len(masks)
    codes = inference.segment(model, tiles, Postprocessing(cut, tta, least), gpus=False)
    agreement = [
        np.mean(rle.decode(codes[str(i)]) == mask) for i, mask in zip(rows["id"], masks, strict=True)
    ]
    assert min(agreement) > 0.999  # a pixel on the threshold may fall to either side


def test_calibration_scores_as_the_masks_do(model: Path, data: Path) -> None:
    table = dataset.read_train(dataset.open_folder(str(data)))
    tiles, _ = dataset.decode(table)
    chosen, scores, _ = inference.calibrate(model, tiles, gpus=False)
    codes = inference.segment(model, tiles, chosen, gpus=False)
    truth = np.stack([rle.decode(code) for code in table.rows["rle"]])
    predicted = np.stack([rle.decode(codes[i]) for i in table.rows["id"]])
    assert scores[f"{chosen.threshold:.2f}"] == pytest.approx(metrics.mean_precision(predicted, truth))
    assert scores[f"{chosen.threshold:.2f}"] == max(scores.values())


def test_the_table_and_the_pictures_are_those_of_the_model(model: Path, data: Path) -> None:
    table = dataset.read_train(dataset.open_folder(str(data)))
    tiles, _ = dataset.decode(table)
    chosen, scores, known = inference.calibrate(model, tiles, gpus=False)
    examples = validation.choose_examples(known, 3)
    gallery = inference.illustrate(model, tiles, chosen, examples, gpus=False)
    rows = next(iter(tiles.iter_batches(batch_size=None)))
    salt = by_hand(model, torch.tensor(rows["image"]), torch.tensor(rows["z"]), chosen.tta).numpy()
    predicted = salt > chosen.threshold
    predicted[predicted.sum(axis=(1, 2)) < chosen.min_area] = False
    assert known["id"].tolist() == table.rows["id"].tolist()
    assert known["z"].tolist() == table.rows["z"].tolist()
    np.testing.assert_allclose(known["coverage"], table.rows["coverage"])
    np.testing.assert_allclose(known["predicted_coverage"], predicted.mean(axis=(1, 2)), atol=3e-4)
    assert known["precision"].mean() == pytest.approx(scores[f"{chosen.threshold:.2f}"])
    assert gallery["id"].tolist() == [tile for ids in examples.values() for tile in ids]
    for i, (tile, group) in enumerate(zip(gallery["id"].tolist(), gallery["group"].tolist(), strict=True)):
        row = known["id"].tolist().index(tile)
        assert tile in examples[group]
        np.testing.assert_array_equal(gallery["image"][i], rows["image"][row])
        np.testing.assert_array_equal(gallery["truth"][i], rows["mask"][row] > 0)
        assert np.mean(gallery["prediction"][i] == predicted[row]) > 0.999
        np.testing.assert_allclose(gallery["probability"][i] / 255, salt[row], atol=0.003)


def test_without_any_example_there_is_an_empty_gallery(model: Path, data: Path) -> None:
    tiles, _ = dataset.decode(dataset.read_train(dataset.open_folder(str(data))))
    none: dict[str, list[str]] = {group: [] for group in validation.GROUPS}
    assert len(inference.illustrate(model, tiles, Postprocessing(), none, gpus=False)["id"]) == 0


def test_what_was_not_stored_with_a_model_has_its_default(model: Path) -> None:
    assert inference.stored_postprocessing(model) == Postprocessing(0.62, False, 0)


def test_the_score_away_from_the_training_tiles(data: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    names = sorted(file.name for file in (folder / "train" / "images").iterdir())
    # One picture in two tiles, side by side: the first trains, the second validates.
    picture = gaussian_filter(np.random.default_rng(0).normal(size=(TILE, 2 * TILE)), (2, 6))
    grey = ((picture - picture.min()) / np.ptp(picture) * 255).astype(np.uint8)
    for name, half in zip((names[0], names[-1]), (grey[:, :TILE], grey[:, TILE:]), strict=True):
        Image.fromarray(half).save(folder / "train" / "images" / name)
    rows = dataset.read_train(dataset.open_folder(str(folder)))
    trains = np.arange(len(names)) < 12
    training, validated = (dataset.decode(rows.where(part))[0] for part in (trains, ~trains))
    scores = np.linspace(0, 1, 24)
    # The last tile validates and is no lone one; as folds, the first is none either.
    judged, both = outcome.lone_score([validated, training], scores[:12]), [training, validated]
    assert judged == {"lone": {"tiles": 11, "map": pytest.approx(scores[:11].mean())}}
    assert outcome.lone_score(both, scores) == {
        "lone": {"tiles": 22, "map": pytest.approx(scores[1:-1].mean())}
    }
    few, _ = dataset.decode(rows.where(~trains & (rows.rows["id"] != Path(names[-1]).stem)))
    assert outcome.lone_score([few, training], scores[:11]) == {}
