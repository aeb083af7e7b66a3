"""Folds: even, seeded, and with the neighbours of a mosaic together."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy import typing as npt
from PIL import Image
from scipy.ndimage import gaussian_filter

from saltray import demo
from saltray.config import TILE, Split
from saltray.data import dataset, neighbours
from saltray.data.dataset import DataError
from saltray.data.neighbours import beside_others, find_neighbours, groups_of, read_groups
from saltray.data.splitting import stratified_folds


def spread(values: npt.NDArray[np.generic] | list[int]) -> int:
    return int(np.max(values) - np.min(values))


@pytest.mark.parametrize("folds", [2, 5, 7])
def test_folds_are_complete_and_alike(folds: int) -> None:
    rng = np.random.default_rng(1)
    coverage = np.where(rng.random(403) < 0.39, 0.0, rng.random(403))
    fold = stratified_folds(coverage, folds, seed=0)
    assert fold.dtype == np.int64 and fold.shape == (403,)
    counts = np.bincount(fold, minlength=folds)
    assert len(counts) == folds and spread(counts) <= 1
    assert spread([int((coverage[fold == f] == 0).sum()) for f in range(folds)]) <= 1
    # The tiles with salt, in ten classes by coverage: each fold has its share of each.
    order = np.argsort(coverage)[int((coverage == 0).sum()) :]
    classes = np.arange(len(order)) * 10 // len(order)
    for k in range(10):
        assert spread(np.bincount(fold[order[classes == k]], minlength=folds)) <= 1


def test_folds_follow_the_seed() -> None:
    coverage = np.random.default_rng(1).random(200)
    first = stratified_folds(coverage, 5, seed=4)
    assert np.array_equal(first, stratified_folds(coverage, 5, seed=4))
    assert not np.array_equal(first, stratified_folds(coverage, 5, seed=5))


@given(
    coverage=st.lists(st.one_of(st.just(0.0), st.just(1.0), st.floats(0, 1)), min_size=5, max_size=60),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_coverage_gives_even_folds(coverage: list[float], seed: int) -> None:
    """All empty, all salt, few of either: no warning, and folds of one size."""
    fold = stratified_folds(coverage, 5, seed)
    counts = np.bincount(fold, minlength=5)
    assert len(fold) == len(coverage) and len(counts) == 5 and spread(counts) <= 1
    salt = np.asarray(coverage) > 0
    if min(salt.sum(), (~salt).sum()) >= 5:
        assert spread(np.bincount(fold[salt], minlength=5)) <= 1


@pytest.mark.parametrize("empty", [0, 1, 4, 5, 20, 36, 39, 40])
def test_few_tiles_of_either_kind_split_evenly(empty: int) -> None:
    coverage = np.concatenate([np.zeros(empty), np.linspace(0.01, 1, 40 - empty)])
    fold = stratified_folds(coverage, 5, seed=0)
    assert np.bincount(fold).tolist() == [8] * 5
    if 5 <= empty <= 35:
        assert spread(np.bincount(fold[:empty], minlength=5)) <= 1


@pytest.mark.parametrize("tiles", [0, 1, 4])
def test_too_few_tiles_are_refused(tiles: int) -> None:
    with pytest.raises(DataError, match=f"{tiles} labelled tiles: too few for 5 folds"):
        stratified_folds(np.full(tiles, 0.5), 5, seed=0)


SPLITS: tuple[Split, ...] = ("coverage", "neighbours")


def mosaic(rng: np.random.Generator, rows: int, columns: int) -> npt.NDArray[np.uint8]:
    """Cut a layered picture into tiles, row by row, each stretched to a contrast of its own."""
    picture = gaussian_filter(rng.normal(size=(rows * TILE, columns * TILE)), (2, 6))
    tiles = picture.reshape(rows, TILE, columns, TILE).swapaxes(1, 2).reshape(-1, TILE, TILE)
    low, high = tiles.min(axis=(1, 2), keepdims=True), tiles.max(axis=(1, 2), keepdims=True)
    bright = rng.uniform(150, 255, (len(tiles), 1, 1))
    return np.asarray(np.rint((tiles - low) / (high - low) * bright), np.uint8)


def test_neighbours_in_mosaics_are_found_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "_CHUNK", 7)  # more than one chunk, the last smaller
    rng = np.random.default_rng(0)
    lone = np.stack([demo.tile(rng)[0] for _ in range(20)])
    flat = np.full((5, TILE, TILE), 90, np.uint8)
    images = np.concatenate([mosaic(rng, 3, 4), lone, flat, flat[:1] * 0, mosaic(rng, 1, 2)])
    right = [(r * 4 + c, r * 4 + c + 1) for r in range(3) for c in range(3)]
    below = [(r * 4 + c, r * 4 + c + 4) for r in range(2) for c in range(4)]
    expected = {*right, *below, (len(images) - 2, len(images) - 1)}
    order = rng.permutation(len(images))
    pairs = order[find_neighbours(images[order])]
    assert {tuple(pair) for pair in pairs.tolist()} == expected


@pytest.mark.parametrize("tiles", [0, 1])
def test_too_few_tiles_have_no_neighbours(tiles: int) -> None:
    assert find_neighbours(np.zeros((tiles, TILE, TILE), np.uint8)).shape == (0, 2)


def test_tiles_beside_those_of_another_part_are_told() -> None:
    rng = np.random.default_rng(0)
    row, lone = mosaic(rng, 1, 5), np.stack([demo.tile(rng)[0] for _ in range(6)])
    tiles = np.concatenate([lone, row])
    # The row's first two tiles are neighbours, but of one part, as are the third and the fourth.
    part = np.array([0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2])
    assert beside_others(tiles, part).tolist() == [False] * 6 + [False, True, True, True, True]
    assert not beside_others(lone, part[:6]).any()


def test_pairs_join_groups() -> None:
    groups = groups_of(7, np.array([[5, 0], [2, 5], [1, 6]]))
    assert groups[0] == groups[5] == groups[2] and groups[1] == groups[6]
    assert len(set(groups.tolist())) == 4
    assert len(set(groups_of(3, np.empty((0, 2), np.int64)).tolist())) == 3


def test_groups_stay_in_one_fold_and_the_folds_alike() -> None:
    rng = np.random.default_rng(1)
    coverage = np.where(rng.random(403) < 0.39, 0.0, rng.random(403))
    groups = np.where(rng.random(403) < 0.2, rng.integers(0, 25, 403), np.arange(403) + 25)
    fold = stratified_folds(coverage, 5, 0, groups)
    assert all(len(set(fold[groups == g].tolist())) == 1 for g in set(groups.tolist()))
    assert spread(np.bincount(fold)) <= 3
    assert spread([int((coverage[fold == f] == 0).sum()) for f in range(5)]) <= 3
    assert np.array_equal(fold, stratified_folds(coverage, 5, 0, groups))
    assert not np.array_equal(fold, stratified_folds(coverage, 5, 1, groups))


def test_too_few_groups_are_refused() -> None:
    with pytest.raises(DataError, match="4 groups of labelled tiles: too few for 5 folds"):
        stratified_folds(np.full(40, 0.5), 5, 0, np.arange(40) % 4)


def test_a_searchs_split_keeps_neighbours_together_bad_tiles_aside(tmp_path: Path) -> None:
    folder = demo.write(tmp_path, demo.files(train=60, test=1, seed=0))
    tiles = mosaic(np.random.default_rng(2), 1, 8)
    for i, pixels in enumerate(tiles):
        Image.fromarray(pixels).save(folder / "train" / "images" / f"train{7 * i:06d}.png")
    (folder / "train" / "images" / "train000001.png").write_bytes(b"no picture")
    table = dataset.read_train(dataset.open_folder(str(folder)))
    apart, together = (
        stratified_folds(table.rows["coverage"], 5, 0, read_groups(table, split)) for split in SPLITS
    )
    mates = table.rows["id"].isin([f"train{7 * i:06d}" for i in range(8)]).to_numpy()
    assert len(together) == 60 and len(set(together[mates].tolist())) == 1
    assert np.array_equal(apart, stratified_folds(table.rows["coverage"], 5, 0))
    assert len(set(apart[mates].tolist())) > 1
