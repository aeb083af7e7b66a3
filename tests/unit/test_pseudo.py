import numpy as np
import numpy.typing as npt
import pytest

from saltray.config import IGNORED
from saltray.data import folds
from saltray.data.augment import Batch
from saltray.ensembles import pseudo
from saltray.prediction.postprocessing import logit


class Known(pseudo.Labeller):
    """A labeller with given logits."""

    def __init__(self, logits: npt.NDArray[np.float32]) -> None:
        self.given = logits

    def logits(self, batch: Batch, tta: bool = False) -> npt.NDArray[np.float32]:
        assert tta, "labels are worth both views"
        return self.given


def test_labels_are_what_the_models_are_sure_of() -> None:
    probabilities = [0.001, 0.049, 0.051, 0.5, 0.949, 0.951, 0.999]
    logits = np.array([[logit(p) for p in probabilities]], np.float32)
    assert pseudo.label(logits).tolist() == [[0, 0, IGNORED, IGNORED, IGNORED, 1, 1]]
    assert pseudo.label(np.array([-1e4, 1e4], np.float32)).tolist() == [0, 1]


@pytest.mark.parametrize(("unsure", "kept"), [(0, True), (20, True), (21, False), (100, False)])
def test_tiles_of_which_too_little_is_known_are_left_out(unsure: int, kept: bool) -> None:
    logits = np.full((2, 10, 10), -9, np.float32)
    logits[1] = 9
    logits[1].reshape(-1)[:unsure] = 0
    images = np.arange(200, dtype=np.uint8).reshape(2, 10, 10)
    batch = {"row": np.array([4, 7]), "id": np.array(["a", "b"]), "image": images, "z": np.array([1.0, 2.0])}
    out = Known(logits)(batch | {"error": np.array(["", ""])})
    assert tuple(out) == folds.COLUMNS
    assert out["id"].tolist() == ["a", "b"][: 1 + kept]
    # No labelled tile's row may be among them: it seeds the augmentation.
    assert out["row"].tolist() == [pseudo.FIRST_ROW + 4, pseudo.FIRST_ROW + 7][: 1 + kept]
    assert (out["mask"][0] == 0).all() and out["mask"].dtype == np.uint8
    np.testing.assert_array_equal(out["image"], images[: 1 + kept])
    if kept:
        assert (out["mask"][1] == IGNORED).sum() == unsure
        assert out["coverage"].tolist() == pytest.approx([0, 1 - unsure / 100])
