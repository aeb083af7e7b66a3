from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from saltray.config import TILE
from saltray.contest.metrics import IOU_THRESHOLDS
from saltray.prediction import validation
from saltray.prediction.validation import ValidationError


def table_of(coverage: list[float], predicted: list[float], iou: list[float]) -> pd.DataFrame:
    ids = [f"t{i}" for i in range(len(iou))]
    return pd.DataFrame({"id": ids, "coverage": coverage, "predicted_coverage": predicted, "iou": iou})


def test_the_table_agrees_with_an_obvious_loop() -> None:
    rng = np.random.default_rng(0)
    truth, prediction = rng.random((2, 12, TILE, TILE)) < rng.random((2, 12, 1, 1))
    truth[0] = prediction[0] = prediction[1] = truth[2] = False
    counts = [((t & p).sum(), (t | p).sum(), t.sum()) for t, p in zip(truth, prediction, strict=True)]
    intersection, union, salt = map(list, zip(*counts, strict=True))
    table = validation.tabulate(range(12), salt, intersection, union, np.arange(12))
    for row, t, p in zip(table.itertuples(index=False), truth, prediction, strict=True):
        true, predicted = set(map(tuple, np.argwhere(t))), set(map(tuple, np.argwhere(p)))
        iou = len(true & predicted) / len(true | predicted) if true | predicted else 1.0
        passed = sum(iou > threshold for threshold in IOU_THRESHOLDS) / 10
        assert row.coverage == len(true) / TILE**2
        assert row.predicted_coverage == len(predicted) / TILE**2
        assert row.iou == iou
        assert row.precision == pytest.approx(passed if true | predicted else 1.0)


def test_examples_are_telling_and_stand_in_one_group() -> None:
    rng = np.random.default_rng(1)
    coverage = np.where(rng.random(300) < 0.4, 0, rng.random(300))
    predicted = np.where(rng.random(300) < 0.3, 0, rng.random(300))
    iou = np.where((coverage == 0) | (predicted == 0), 0.0, rng.random(300))
    iou[(coverage == 0) & (predicted == 0)] = 1
    table = table_of(coverage.tolist(), predicted.tolist(), iou.tolist())
    examples = validation.choose_examples(table, 6)
    known = table.set_index("id")
    shown = [tile for tiles in examples.values() for tile in tiles]
    assert len(set(shown)) == len(shown) == 24
    assert not ((known.loc[shown, "coverage"] == 0) & (known.loc[shown, "predicted_coverage"] == 0)).any()
    assert known.loc[examples["best"], "coverage"].between(0, 0.9, inclusive="right").all()
    salt = known[known["coverage"] > 0]
    assert known.loc[examples["best"], "iou"].max() == salt.loc[salt["coverage"] <= 0.9, "iou"].max()
    assert known.loc[examples["worst"], "iou"].max() <= salt["iou"].quantile(0.05)
    assert known.loc[examples["median"], "iou"].mean() == pytest.approx(salt["iou"].median(), abs=0.05)
    assert (known.loc[examples["false alarm"], "coverage"] == 0).all()


@pytest.mark.parametrize("salt", [0, 1, 2, 5])
def test_few_tiles_are_shared_out(salt: int) -> None:
    table = table_of([0.5] * salt + [0.0], [0.5] * (salt + 1), [0.5] * salt + [0.0])
    examples = validation.choose_examples(table, 6)
    shown = [tile for tiles in examples.values() for tile in tiles]
    assert len(set(shown)) == len(shown)
    assert len(examples["false alarm"]) == 1
    assert [bool(examples[group]) for group in ("best", "worst", "median")] == [salt > i for i in range(3)]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert validation.read_table(tmp_path) is None
    assert validation.read_gallery(tmp_path) is None
    table = validation.tabulate(["a", "NA"], [10, 0], [5, 0], [15, 0], [50.5, np.nan])
    validation.write(tmp_path, table, validation.no_gallery())
    known = validation.read_table(tmp_path)
    assert known is not None
    pd.testing.assert_frame_equal(known, table, rtol=1e-5, check_dtype=False)
    gallery = validation.read_gallery(tmp_path)
    assert gallery is not None
    assert gallery["image"].shape == (0, TILE, TILE)


@pytest.mark.parametrize(
    "content",
    ["", "id,iou\na,1\n", "\x00\x01", "id,coverage,predicted_coverage,iou,precision,z\na,b,c,d,e,f\n"],
)
def test_damaged_files_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "validation.csv").write_text(content)
    (tmp_path / "gallery.npz").write_text(content)
    with pytest.raises(ValidationError, match=r"validation\.csv: damaged"):
        validation.read_table(tmp_path)
    with pytest.raises(ValidationError, match=r"gallery\.npz: damaged"):
        validation.read_gallery(tmp_path)
