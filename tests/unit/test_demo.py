from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from saltray import demo
from saltray.config import TILE, UserError
from saltray.contest import rle, submission


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo")
    assert demo.write(path, demo.files(train=30, test=12, seed=4)) == path / "data"
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_it_is_the_contests_layout(folder: Path) -> None:
    data = folder / "data"
    train, depths = pd.read_csv(data / "train.csv"), pd.read_csv(data / "depths.csv")
    sample = pd.read_csv(data / "sample_submission.csv")
    assert list(train) == list(sample) == ["id", "rle_mask"]
    assert list(depths) == ["id", "z"]
    assert (len(train), len(sample)) == (30, 12)
    assert set(depths["id"]) == {*train["id"], *sample["id"]}
    assert len(depths) == 42
    assert depths["z"].between(50, 959).all()
    assert depths["z"].dtype == np.int64
    assert set(sample["rle_mask"]) == {"1 1"}
    for part, ids in (("train/images", train), ("train/masks", train), ("test/images", sample)):
        assert {file.name for file in (data / part).iterdir()} == {f"{i}.png" for i in ids["id"]}
    assert not (data / "test" / "masks").exists()


def test_images_and_masks_have_the_contests_png_modes(folder: Path) -> None:
    modes = set()
    for name, code in submission.read(folder / "data" / "train.csv").items():
        with Image.open(folder / "data" / "train" / "images" / f"{name}.png") as image:
            assert (image.mode, image.size) == ("RGB", (TILE, TILE))
            red, green, blue = np.moveaxis(np.asarray(image), 2, 0)
        assert np.array_equal(red, green) and np.array_equal(red, blue)
        assert red.std() > 1
        with Image.open(folder / "data" / "train" / "masks" / f"{name}.png") as image:
            mode, pixels = image.mode, np.asarray(image)
        assert set(np.unique(pixels)) <= {0, 65535}
        assert mode == ("I;16" if code else "L")
        np.testing.assert_array_equal(pixels > 0, rle.decode(code))
        modes.add(mode)
    assert modes == {"I;16", "L"}


def test_the_truth_is_apart_and_fits_the_test_tiles(folder: Path) -> None:
    truth, sample = folder / "truth.csv", folder / "data" / "sample_submission.csv"
    assert list(submission.read(truth).index) == list(submission.read(sample).index)
    assert submission.score(truth, truth) == 1
    assert submission.score(sample, truth) < 0.2
    # The same tiles, drawn again from the seed: 30 for training, then these.
    rng = np.random.default_rng(4)
    tiles = [demo.tile(rng) for _ in range(42)][30:]
    for (name, code), (image, mask, _) in zip(submission.read(truth).items(), tiles, strict=True):
        np.testing.assert_array_equal(rle.decode(code), mask)
        with Image.open(folder / "data" / "test" / "images" / f"{name}.png") as png:
            np.testing.assert_array_equal(np.asarray(png)[:, :, 0], image)


def test_the_same_seed_writes_the_same_files(folder: Path, tmp_path: Path) -> None:
    demo.write(tmp_path / "same", demo.files(train=30, test=12, seed=4))
    assert contents(tmp_path / "same") == contents(folder)
    demo.write(tmp_path / "other", demo.files(train=30, test=12, seed=5))
    other, first = contents(tmp_path / "other"), contents(folder)
    assert other.keys() == first.keys()
    assert sum(other[name] == first[name] for name in other if "images" in name) == 0


def test_share_of_empties_and_coverage_are_near_the_real_sets() -> None:
    rng = np.random.default_rng(0)
    coverage = np.array([demo.tile(rng)[1].mean() for _ in range(300)])
    assert np.mean(coverage == 0) == pytest.approx(0.39, abs=0.06)
    salt = coverage[coverage > 0]
    assert 0.25 < np.median(salt) < 0.5
    assert salt.min() < 0.1
    assert 0.8 < salt.max() < 1  # no mask is full


def test_a_tiles_types_and_ranges() -> None:
    rng = np.random.default_rng(1)
    for _ in range(5):
        image, mask, depth = demo.tile(rng)
        assert image.shape == mask.shape == (TILE, TILE)
        assert image.dtype == np.uint8 and mask.dtype == bool
        assert 50 <= depth <= 959


def test_ricker_is_the_second_derivative_of_a_gaussian() -> None:
    frequency, step = 0.08, 1e-3
    t = np.arange(-15, 16)

    def gaussian(x: np.ndarray) -> np.ndarray:
        return np.asarray(np.exp(-((np.pi * frequency * x) ** 2)))

    second = (gaussian(t + step) - 2 * gaussian(t) + gaussian(t - step)) / step**2
    np.testing.assert_allclose(demo.ricker(frequency), -second / (2 * (np.pi * frequency) ** 2), atol=1e-6)
    assert demo.ricker(frequency).argmax() == 15


@pytest.mark.parametrize("existing", ["data", "truth.csv"])
def test_an_existing_folder_is_refused_and_left_alone(tmp_path: Path, existing: str) -> None:
    (tmp_path / existing).mkdir() if existing == "data" else (tmp_path / existing).write_text("mine")
    with pytest.raises(UserError, match="already there; choose another folder"):
        demo.write(tmp_path, demo.files(train=10, test=1, seed=0))
    assert [file.name for file in tmp_path.iterdir()] == [existing]
    assert existing == "data" or (tmp_path / existing).read_text() == "mine"


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/demo: cannot be written: "):
        demo.write(tmp_path / "file" / "demo", demo.files(train=10, test=1, seed=0))


def test_another_file_in_the_folder_does_not_hinder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert demo.write(tmp_path, demo.files(train=1, test=1, seed=0)).is_dir()
