from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from saltray.config import DEBUG
from saltray.network.model import build_model
from saltray.training import checkpoint, samples

Batch = dict[str, np.ndarray]


def batch(coverages: list[float], seed: int = 0) -> Batch:
    count = len(coverages)
    image = np.random.default_rng(seed).integers(0, 256, (count, 101, 101), np.uint8)
    mask = np.zeros((count, 101, 101), np.uint8)
    for tile, coverage in zip(mask, coverages, strict=True):
        tile[: round(101 * coverage)] = 1
    return {
        "image": image,
        "mask": mask,
        "coverage": np.array(coverages, np.float32),
        "z": np.arange(count, dtype=np.float32),
    }


def test_chooses_one_empty_tile_and_all_degrees_of_salt() -> None:
    coverages = [i / 100 for i in range(1, 101)]
    rng = np.random.default_rng(0)
    order = [0.0, *rng.permutation(coverages).tolist(), 0.0, 0.0]
    chosen = samples.choose([batch(order[:40], 1), batch(order[40:], 2)])
    filled = chosen.mask.mean(axis=(1, 2))
    assert len(filled) == samples.COUNT and filled[0] == 0
    assert filled[1:] == pytest.approx(np.linspace(0.01, 1, 7), abs=0.01)
    assert np.array_equal(chosen.image[0], batch(order[:40], 1)["image"][0]) and chosen.depth[0] == 0


def test_a_network_that_takes_the_depth_gets_each_tiles_own(tmp_path: Path) -> None:
    config = DEBUG.model_copy(update={"model": DEBUG.model.model_copy(update={"depth": True})})
    torch.manual_seed(0)
    model = build_model(config.model)
    checkpoint.save(tmp_path, model.state_dict(), config, {})
    pictures = []
    for depth in (0.0, 0.0, 900.0):
        tiles = samples.choose([batch([0.0, 0.5]) | {"z": np.full(2, depth, np.float32)}])
        samples.draw(tmp_path, tiles, torch.device("cpu"))
        pictures.append(np.asarray(Image.open(tmp_path / samples.PICTURE)))
    assert np.array_equal(pictures[0], pictures[1]) and not np.array_equal(pictures[1], pictures[2])


@pytest.mark.parametrize("coverages", [[0.0, 0.0], [0.3], [0.0, 0.5, 0.2]])
def test_few_tiles_are_each_shown_once(coverages: list[float]) -> None:
    expected = sorted(set(coverages))
    chosen = samples.choose([batch(coverages)])
    assert chosen.mask.mean(axis=(1, 2)) == pytest.approx(expected, abs=0.01)


def test_the_picture_shows_tile_truth_and_prediction(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build_model(DEBUG.model).eval()
    checkpoint.save(tmp_path, model.state_dict(), DEBUG, {})
    tiles = samples.choose([batch([0.0, 0.2, 0.6])])
    samples.draw(tmp_path, tiles, torch.device("cpu"))
    picture = np.asarray(Image.open(tmp_path / samples.PICTURE))
    gap, step = 3, 104
    assert picture.shape == (3 * step + gap, 3 * step + gap)
    with torch.inference_mode():
        salt = torch.sigmoid(model(torch.from_numpy(tiles.image).unsqueeze(1) / 255)).numpy()
    for i in range(3):
        left = gap + i * step
        shown = [picture[gap + r * step : (r + 1) * step, left : left + 101] for r in range(3)]
        assert np.array_equal(shown[0], tiles.image[i])
        assert np.array_equal(shown[1], tiles.mask[i] * 255)
        assert np.abs(shown[2] / 255 - salt[i]).max() < 1 / 255
