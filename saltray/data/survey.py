"""What the contest's folder holds: its tiles in memory, and what is to be known of them before training."""

import hashlib
from collections import defaultdict
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from saltray.config import TILE, Split
from saltray.data import dataset, neighbours, splitting

TINY = 10
"""Pixels of salt at most, in a mask called tiny."""

CLASSES = ["empty", *(f"{low}–{low + 10}" for low in range(0, 100, 10))]
"""Of coverage in per cent; a class holds its upper limit, not its lower."""

Bools = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.uint8]


class Survey(NamedTuple):
    """The readable tiles; pixels are uint8 (tiles, 101, 101), in the order of their frame."""

    labelled: pd.DataFrame
    """Columns id, z, pixels (of salt), coverage (in [0, 1]), part (training or validation)."""
    images: Pixels
    masks: Pixels
    test: pd.DataFrame
    """Columns id, z."""
    test_images: Pixels
    problems: dataset.Problems
    neighbours: npt.NDArray[np.int64]
    """Pairs (n, 2) of positions of labelled tiles that seem to lie side by side (`data.neighbours`)."""


def read(uri: str, seed: int, split: Split = "coverage") -> Survey:
    """Read and decode the contest's folder; `seed` and kind are those of the split.

    Raises:
        DataError: the folder cannot be used, or has too few readable tiles to be split.
    """
    folder = dataset.open_folder(uri)
    train, test = dataset.read_train(folder), dataset.read_test(folder)
    problems = train.problems | test.problems
    _check_number(len(train.rows), splitting.FOLDS, problems, uri)
    tiles, bad = dataset.decode_local(train)
    test_tiles, test_bad = dataset.decode_local(test)
    problems |= bad | test_bad
    _check_number(len(tiles["id"]), 1, problems, uri)
    pairs = neighbours.find_neighbours(tiles["image"])
    # Of the whole table, as in a search: a tile that proves damaged moves no other.
    groups = neighbours.groups_in(train, tiles["row"], pairs) if split == "neighbours" else None
    assigned = splitting.stratified_folds(train.rows["coverage"], splitting.FOLDS, seed, groups)
    fold = pd.Series(assigned, index=train.rows["row"])
    pixels = tiles["mask"].sum(axis=(1, 2), dtype=np.int64)
    labelled = pd.DataFrame({"id": tiles["id"].astype(str), "z": tiles["z"], "pixels": pixels})
    labelled["coverage"] = pixels / TILE**2
    labelled["part"] = np.where(fold[tiles["row"]] == 0, "validation", "training")
    return Survey(
        labelled=labelled,
        images=tiles["image"],
        masks=tiles["mask"],
        test=pd.DataFrame({"id": test_tiles["id"].astype(str), "z": test_tiles["z"]}),
        test_images=test_tiles["image"],
        problems=problems,
        neighbours=pairs,
    )


def coverage_class(pixels: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Return each mask's place in CLASSES, int64, from its number of pixels of salt."""
    tenths = np.asarray(pixels, np.int64) * 10
    return -(-tenths // TILE**2)  # rounded up, in whole numbers


def vertical_stripes(masks: Pixels) -> Bools:
    """Tell which masks have only columns all of salt or all without, and some of both.

    Args:
        masks: uint8 (tiles, height, width) in {0, 1}.

    Returns:
        bool (tiles,).
    """
    constant = (masks == masks[:, :1]).all(axis=(1, 2))
    return np.asarray(constant & masks.any(axis=(1, 2)) & ~masks.all(axis=(1, 2)))


def tiny(pixels: npt.ArrayLike) -> Bools:
    """Tell which masks hold some salt, but TINY pixels at most."""
    pixels = np.asarray(pixels)
    return np.asarray((pixels > 0) & (pixels <= TINY))


def black(images: Pixels) -> Bools:
    """Tell which images, uint8 (tiles, height, width), are zero everywhere; bool (tiles,)."""
    return np.asarray(~images.any(axis=(1, 2)))


def equal_images(images: Pixels) -> list[list[int]]:
    """Return groups of the positions of equal images, black ones apart, each of two or more."""
    groups: defaultdict[bytes, list[int]] = defaultdict(list)
    for i in np.flatnonzero(~black(images)):
        groups[hashlib.sha256(images[i].tobytes()).digest()].append(int(i))
    return [group for group in groups.values() if len(group) > 1]


def depth_bins(tiles: pd.DataFrame) -> pd.DataFrame:
    """Cut tiles into up to ten depth ranges of equally many tiles.

    Args:
        tiles: with the columns z, pixels and coverage.

    Returns:
        One row a range, from shallow to deep: tiles (number), z (median), salt (share of tiles with any) and
        its standard error (binomial), low, middle and high (the quartiles of coverage).
    """
    ranges = np.minimum(tiles["z"].rank(method="first").sub(1) * 10 // max(len(tiles), 1), 9)
    groups = tiles.assign(salt=tiles["pixels"] > 0).groupby(ranges)
    bins = pd.DataFrame({"tiles": groups.size(), "z": groups["z"].median(), "salt": groups["salt"].mean()})
    bins["error"] = np.sqrt(bins["salt"] * (1 - bins["salt"]) / bins["tiles"])
    for name, quantile in (("low", 0.25), ("middle", 0.5), ("high", 0.75)):
        bins[name] = groups["coverage"].quantile(quantile)
    return bins.reset_index(drop=True)


def equal_tiles(data: Survey) -> pd.DataFrame:
    """Return one row a group of equal images, black ones apart.

    Columns: labelled and test (their ids, with commas between), masks agree (yes, no, or a dash where at most
    one is labelled).
    """
    labelled = len(data.labelled)
    rows = []
    for group in equal_images(np.concatenate([data.images, data.test_images])):
        ours = [i for i in group if i < labelled]
        masks = data.masks[ours]
        rows.append(
            {
                "labelled": ", ".join(data.labelled["id"].iloc[ours]),
                "test": ", ".join(data.test["id"].iloc[[i - labelled for i in group if i >= labelled]]),
                "masks agree": ("yes" if (masks == masks[0]).all() else "no") if len(ours) > 1 else "–",
            }
        )
    return pd.DataFrame(rows, columns=["labelled", "test", "masks agree"])


def _check_number(tiles: int, least: int, problems: dataset.Problems, uri: str) -> None:
    """Refuse bad tiles only where they leave too few good ones."""
    if tiles < least and problems:
        tile, problem = min(problems.items())
        raise dataset.DataError(
            f"{uri}: {tiles} good labelled tiles, too few to explore; "
            f"{len(problems)} are bad, such as {tile}: {problem}"
        )
