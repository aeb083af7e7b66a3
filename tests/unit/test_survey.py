"""What is found out of the tiles, against plain loops."""

import re
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from saltray import demo
from saltray.config import TILE
from saltray.data import dataset, splitting, survey
from saltray.data.dataset import DataError


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo.write(tmp_path_factory.mktemp("demo"), demo.files(train=30, test=6, seed=5))


@pytest.fixture
def data(pristine: Path, tmp_path: Path) -> Path:
    """A data set of the test's own, to be spoilt."""
    return Path(shutil.copytree(pristine, tmp_path / "data"))


def test_coverage_classes_hold_their_upper_limit() -> None:
    pixels = np.arange(TILE**2 + 1)
    expected = []
    for count in range(TILE**2 + 1):
        tenths = Fraction(10 * count, TILE**2)
        expected.append(next(n for n in range(11) if tenths <= n))
    assert survey.coverage_class(pixels).tolist() == expected
    assert len(survey.CLASSES) == 11


def test_odd_masks_and_images() -> None:
    rng = np.random.default_rng(0)
    stripes = np.repeat(rng.random((40, 1, 8)) < 0.5, 6, axis=1)
    masks = np.concatenate([stripes, np.zeros((1, 6, 8)), np.ones((1, 6, 8)), rng.random((40, 6, 8)) < 0.5])
    masks[3, 2, 4] = 1 - masks[3, 2, 4]  # one pixel, and it is no stripe any more
    expected = []
    for mask in masks:
        columns = [set(mask[:, x].tolist()) for x in range(8)]
        expected.append(all(len(c) == 1 for c in columns) and set.union(*columns) == {0, 1})
    assert survey.vertical_stripes(masks.astype(np.uint8)).tolist() == expected
    assert 30 < sum(expected) < 40
    images = np.zeros((3, 4, 4), np.uint8)
    images[1, 3, 3] = 1
    images[2] = 255
    assert survey.black(images).tolist() == [True, False, False]
    assert survey.tiny([0, 1, 10, 11]).tolist() == [False, True, True, False]


def test_equal_images_are_grouped_and_black_ones_apart() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 2, (60, 2, 2), dtype=np.uint8)  # 16 kinds, one of them black
    expected = set()
    for i in range(60):
        if images[i].any():
            expected.add(tuple(j for j in range(60) if np.array_equal(images[i], images[j])))
    found = survey.equal_images(images)
    assert {tuple(group) for group in found} == {group for group in expected if len(group) > 1}
    assert len(found) == len(set(map(tuple, found))) > 5


def test_depth_ranges_hold_equally_many_tiles() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 500, 100) * (rng.random(100) < 0.6)
    tiles = pd.DataFrame({"z": rng.integers(50, 60, 100), "pixels": pixels, "coverage": pixels / TILE**2})
    bins = survey.depth_bins(tiles)
    order = sorted(range(100), key=lambda i: (tiles["z"][i], i))
    assert len(bins) == 10
    for number in range(10):
        members = order[number * 10 : number * 10 + 10]
        share = sum(pixels[i] > 0 for i in members) / 10
        row = bins.iloc[number]
        assert row["tiles"] == 10
        assert row["z"] == np.median([tiles["z"][i] for i in members])
        assert row["salt"] == pytest.approx(share)
        assert row["error"] == pytest.approx((share * (1 - share) / 10) ** 0.5)
        quartiles = np.quantile([tiles["coverage"][i] for i in members], [0.25, 0.5, 0.75])
        assert row[["low", "middle", "high"]].tolist() == pytest.approx(quartiles)
    assert survey.depth_bins(tiles[:3])["tiles"].tolist() == [1, 1, 1]
    assert len(survey.depth_bins(tiles[:0])) == 0


def test_tiles_are_read_with_the_split_of_a_search(pristine: Path) -> None:
    found = survey.read(str(pristine), seed=3)
    table = dataset.read_train(dataset.open_folder(str(pristine)))
    fold = splitting.stratified_folds(table.rows["coverage"], 5, 3)
    assert found.labelled["id"].tolist() == table.rows["id"].tolist()
    assert (found.labelled["part"] == "validation").tolist() == (fold == 0).tolist()
    assert found.labelled["pixels"].tolist() == [int(mask.sum()) for mask in found.masks]
    assert found.labelled["coverage"].tolist() == pytest.approx(table.rows["coverage"].tolist())
    assert (
        found.test["z"].tolist() == dataset.read_test(dataset.open_folder(str(pristine))).rows["z"].tolist()
    )
    assert found.problems == {}


def test_a_zip_and_a_uri_are_read_alike(pristine: Path, data: Path) -> None:
    expected = survey.read(str(pristine), seed=0)
    for part in ("train", "test"):
        shutil.make_archive(str(data / part), "zip", data / part)
        shutil.rmtree(data / part)
    for uri in (str(data), data.as_uri()):
        found = survey.read(uri, seed=0)
        pd.testing.assert_frame_equal(found.labelled, expected.labelled)
        assert np.array_equal(found.images, expected.images)
        assert np.array_equal(found.test_images, expected.test_images)
        assert np.array_equal(found.masks, expected.masks)


def test_a_damaged_tile_is_left_out_and_moves_no_other(data: Path) -> None:
    before = survey.read(str(data), seed=0)
    bad = before.labelled["id"][7]
    (data / "train" / "images" / f"{bad}.png").write_bytes(b"damaged")
    (data / "test" / "images" / "test000030.png").unlink()
    after = survey.read(str(data), seed=0)
    pd.testing.assert_frame_equal(after.labelled, before.labelled.drop(7).reset_index(drop=True))
    assert np.array_equal(after.images, np.delete(before.images, 7, axis=0))
    assert np.array_equal(after.masks, np.delete(before.masks, 7, axis=0))
    assert after.problems.keys() == {bad, "test000030"}
    assert "truncated" in after.problems[bad]


def test_equal_tiles_name_their_parts_and_compare_their_masks(data: Path) -> None:
    tiles = survey.read(str(data), seed=0)
    salt = tiles.labelled["id"][tiles.labelled["pixels"] > 0].tolist()
    images, test = data / "train" / "images", data / "test" / "images"
    for copy in (images / f"{salt[1]}.png", test / "test000032.png"):
        shutil.copy(images / f"{salt[0]}.png", copy)
    shutil.copy(images / f"{salt[2]}.png", test / "test000034.png")
    found = survey.equal_tiles(survey.read(str(data), seed=0))
    assert found.to_dict("records") == [
        {"labelled": f"{salt[0]}, {salt[1]}", "test": "test000032", "masks agree": "no"},
        {"labelled": salt[2], "test": "test000034", "masks agree": "–"},
    ]


def test_too_few_good_tiles_name_a_bad_one(data: Path) -> None:
    for file in sorted((data / "train" / "masks").iterdir())[:27]:
        file.unlink()
    message = re.escape(
        f"{data}: 3 good labelled tiles, too few to explore; 27 are bad, such as train000000: in"
    )
    with pytest.raises(DataError, match=message):
        survey.read(str(data), seed=0)


def test_not_one_readable_tile_names_a_bad_one(data: Path) -> None:
    for file in (data / "train" / "images").iterdir():
        file.write_bytes(b"damaged")
    with pytest.raises(
        DataError, match=r"0 good labelled tiles, .*; 30 are bad, such as train000000: .*truncated"
    ):
        survey.read(str(data), seed=0)
