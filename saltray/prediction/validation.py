"""What the best model does on each validation tile: the search writes it, the report reads it.

validation.csv   one row per validation tile, in the order of the stream
gallery.npz      a few tiles to look at, with truth, prediction and probability
"""

import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from saltray.config import TILE, UserError
from saltray.contest import metrics

TABLE, GALLERY = "validation.csv", "gallery.npz"

COLUMNS = ("id", "coverage", "predicted_coverage", "iou", "precision", "z")

EASY = 0.9
"""Share of salt above which a tile is left out of the best: all salt but a corner is easily right."""

GROUPS = {
    "best": f"the highest IoU among tiles with salt, but not more than {EASY:.0%} of it",
    "median": "the middle of all tiles with salt, ordered by IoU",
    "worst": "the lowest IoU of all tiles with salt; of equal ones, those with the most salt",
    "false alarm": "tiles without any salt: those with the largest predictions",
}
"""The gallery's groups and how each is chosen. Tiles without salt that are predicted so are left out: they
score 1 and show nothing."""

Gallery = dict[str, npt.NDArray[np.generic]]
"""`group` and `id` (text), `image` uint8, `truth` and `prediction` bool, `probability` uint8 (255 is 1), each
(tiles, ...)."""


class ValidationError(UserError):
    """A file of a run's validation is damaged."""


def tabulate(
    ids: npt.ArrayLike,
    salt: npt.ArrayLike,
    intersection: npt.ArrayLike,
    union: npt.ArrayLike,
    z: npt.ArrayLike,
) -> pd.DataFrame:
    """Tell each tile's result from its pixel counts at one threshold.

    Args:
        ids: of the tiles, in any order.
        salt: true salt, in pixels.
        intersection: of truth and prediction, in pixels.
        union: of truth and prediction, in pixels.
        z: depth, as the contest gives it.

    Returns:
        A table of `COLUMNS`: the coverages are shares of the tile in [0, 1], `iou` is 1 where truth and
        prediction are both empty, `precision` is the contest's score of the tile.
    """
    true, common, either = (np.asarray(a, np.int64) for a in (salt, intersection, union))
    predicted = common + either - true  # |P| = |P and T| + |P or T| - |T|
    return pd.DataFrame(
        {
            "id": np.asarray(ids, dtype=str),
            "coverage": true / TILE**2,
            "predicted_coverage": predicted / TILE**2,
            "iou": np.where(either == 0, 1.0, common / np.maximum(either, 1)),
            "precision": metrics.precision(common, either),
            "z": np.asarray(z, np.float64),
        }
    )


def choose_examples(table: pd.DataFrame, count: int) -> dict[str, list[str]]:
    """Choose the gallery's tiles: group -> ids, at most `count` each and no tile twice; see `GROUPS`."""
    salt = table[table["coverage"] > 0].sort_values(["iou", "coverage", "id"], ascending=[False, True, True])
    ranked = salt["id"].tolist()
    middle = max(0, (len(ranked) - count) // 2)
    empty = table[(table["coverage"] == 0) & (table["predicted_coverage"] > 0)]
    wanted = {
        "best": salt.loc[salt["coverage"] <= EASY, "id"].tolist(),
        "worst": ranked[::-1],
        "median": ranked[middle:],
        "false alarm": empty.sort_values(["predicted_coverage", "id"], ascending=[False, True])[
            "id"
        ].tolist(),
    }
    # Few tiles are shared out: no group may take more than a third of those with salt.
    count_salt = min(count, max(1, len(ranked) // 3))
    examples: dict[str, list[str]] = {}
    taken: set[str] = set()
    for group, ids in wanted.items():
        most = count if group == "false alarm" else count_salt
        examples[group] = [i for i in ids if i not in taken][:most]
        taken.update(examples[group])
    return {group: examples[group] for group in GROUPS}


def no_gallery() -> Gallery:
    """Return a gallery of no tiles."""
    none, text = np.zeros((0, TILE, TILE), np.uint8), np.zeros(0, dtype=str)
    pictures = {"image": none, "truth": none > 0, "prediction": none > 0, "probability": none}
    return {"group": text, "id": text, **pictures}


def write(folder: Path, table: pd.DataFrame, gallery: Gallery) -> None:
    """Write both files into a run's folder, in place of an earlier session's."""
    temporary = folder / (TABLE + ".tmp")
    table.to_csv(temporary, index=False, float_format="%.6g", lineterminator="\n")
    temporary.replace(folder / TABLE)
    temporary = folder / (GALLERY + ".tmp")
    with temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **gallery)
    temporary.replace(folder / GALLERY)


def read_table(folder: Path) -> pd.DataFrame | None:
    """Read `validation.csv`; None where the run has none (yet).

    Raises:
        ValidationError: the file is damaged.
    """
    file = folder / TABLE
    if not file.is_file():
        return None
    try:
        table = pd.read_csv(file, dtype={"id": str}, keep_default_na=False, na_values={"z": [""]})
        table = table[list(COLUMNS)]
        return table.astype(dict.fromkeys(COLUMNS[1:], np.float64))
    except (ValueError, KeyError) as error:  # pandas' own parser errors are ValueErrors
        raise ValidationError(f"{file}: damaged: {error}") from None


def read_gallery(folder: Path) -> Gallery | None:
    """Read `gallery.npz`; None where the run has none (yet).

    Raises:
        ValidationError: the file is damaged.
    """
    file = folder / GALLERY
    if not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as arrays:
            names = ("group", "id", "image", "truth", "prediction", "probability")
            return {name: arrays[name] for name in names}
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValidationError(f"{file}: damaged: {error}") from None
