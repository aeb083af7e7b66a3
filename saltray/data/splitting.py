"""The split of the labelled tiles into folds: alike in coverage, and if wanted with groups kept together."""

import importlib

import numpy as np
import numpy.typing as npt

from saltray.data.dataset import DataError

FOLDS = 5
"""Of a search's split; fold 0 validates: 80/20."""


def stratified_folds(
    coverage: npt.ArrayLike, folds: int, seed: int, groups: npt.ArrayLike | None = None
) -> npt.NDArray[np.int64]:
    """Assign each tile a fold, with the same spread of coverage in all of them.

    Fold 0 of 5 is the validation set of the 80/20 split. Empty tiles are one class; the others are cut into
    up to ten classes of equal size by their coverage.

    Args:
        coverage: share of salt of each tile, in [0, 1].
        folds: number of folds, at least 2.
        seed: of the shuffle.
        groups: a number for each tile; those that share one share a fold, at the cost of some evenness.

    Returns:
        int64 array of shape (tiles,), in [0, folds).

    Raises:
        DataError: there are fewer tiles, or groups, than folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    coverage = np.asarray(coverage, np.float64)
    units, kind = len(coverage), "labelled tiles"
    if groups is not None:
        units, kind = len(np.unique(groups)), "groups of labelled tiles"
    if units < folds:
        raise DataError(f"{units} {kind}: too few for {folds} folds")
    salt = coverage > 0
    classes = np.zeros(len(coverage), np.int64)
    # At least `folds` tiles a class, or a fold could not have one of each.
    bins = min(10, int(salt.sum()) // folds)
    if bins:
        ranks = np.argsort(np.argsort(coverage[salt], kind="stable"), kind="stable")
        classes[salt] = 1 + ranks * bins // int(salt.sum())
    if (~salt).sum() < folds or not bins:
        classes = np.maximum(classes, 1)
    result = np.empty(len(coverage), np.int64)
    splitter = (StratifiedKFold if groups is None else StratifiedGroupKFold)(
        folds, shuffle=True, random_state=seed
    )
    for fold, (_, members) in enumerate(splitter.split(coverage, classes, groups)):
        result[members] = fold
    return result


def load() -> None:
    """Import now what `stratified_folds` needs, nearly a second, while something else is waited for."""
    importlib.import_module("sklearn.model_selection")
