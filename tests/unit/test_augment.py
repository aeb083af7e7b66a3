import numpy as np
import pytest

from saltray.augment import Batch, augment, generator
from saltray.config import AugmentConfig

HALF = AugmentConfig(flip=0.5)


def batch_of(rows: list[int]) -> Batch:
    shape = (len(rows), 6, 5)
    images = np.arange(np.prod(shape)).reshape(shape).astype(np.uint8)
    masks = (np.random.default_rng(0).random(shape) < 0.5).astype(np.uint8)
    return {"row": np.array(rows, np.int64), "image": images, "mask": masks, "z": np.array(rows) * 1.5}


def flips(rows: list[int], seed: int = 0, epoch: int = 1, flip: float = 0.5) -> list[bool]:
    batch = batch_of(rows)
    out = augment(batch, AugmentConfig(flip=flip), seed, epoch)
    return [not np.array_equal(a, b) for a, b in zip(out["image"], batch["image"], strict=True)]


def test_probability_one_mirrors_left_to_right_never_up_down() -> None:
    batch = batch_of([0, 1, 2, 3])
    out = augment(batch, AugmentConfig(flip=1), seed=0, epoch=1)
    for name in ("image", "mask"):
        for y in range(6):
            for x in range(5):
                np.testing.assert_array_equal(out[name][:, y, x], batch[name][:, y, 4 - x])
        assert out[name].dtype == np.uint8


def test_probability_zero_changes_nothing() -> None:
    batch = batch_of(list(range(50)))
    out = augment(batch, AugmentConfig(flip=0), seed=0, epoch=1)
    for name, values in batch.items():
        np.testing.assert_array_equal(out[name], values)


def test_image_and_mask_flip_together_and_other_columns_stay() -> None:
    rows = list(range(40))
    batch = batch_of(rows)
    out = augment(batch, HALF, seed=3, epoch=2)
    flipped = flips(rows, seed=3, epoch=2)
    assert 0 < sum(flipped) < len(rows)
    for i, flip in enumerate(flipped):
        for name in ("image", "mask"):
            np.testing.assert_array_equal(out[name][i], batch[name][i][:, :: -1 if flip else 1])
    assert set(out) == set(batch)
    np.testing.assert_array_equal(out["row"], batch["row"])
    np.testing.assert_array_equal(out["z"], batch["z"])


def test_the_input_is_left_as_it_is() -> None:
    batch, before = batch_of([5, 6, 7, 8]), batch_of([5, 6, 7, 8])
    for values in batch.values():
        values.flags.writeable = False  # as Ray Data's zero-copy blocks are
    augment(batch, AugmentConfig(flip=1), seed=0, epoch=1)
    for name, values in before.items():
        np.testing.assert_array_equal(batch[name], values)


def test_a_row_gets_the_same_whatever_its_batch() -> None:
    rows = [12, 4_000_000_000, 3, 0, 77, 5, 1, 18_000]
    together = flips(rows)
    assert [flips([row])[0] for row in rows] == together
    assert flips(rows[::-1]) == together[::-1]
    assert flips(rows) == together


def test_another_epoch_and_another_seed_differ() -> None:
    rows = list(range(200))
    base = np.array(flips(rows))
    for other in (flips(rows, epoch=2), flips(rows, seed=1), flips(rows, seed=1, epoch=0)):
        assert 0.35 < np.mean(base == np.array(other)) < 0.65


@pytest.mark.parametrize("flip", [0.1, 0.5, 0.8])
def test_share_of_flips_is_the_probability(flip: float) -> None:
    assert np.mean(flips(list(range(3000)), flip=flip)) == pytest.approx(flip, abs=0.03)


def test_streams_of_rows_epochs_and_seeds_are_apart() -> None:
    keys = [(s, e, r) for s in (0, 1, 2**32 - 1) for e in (1, 2) for r in (0, 1, 2, 2**40)]
    draws = {tuple(generator(*key).random(12)) for key in keys}
    values = {value for draw in draws for value in draw}
    assert len(draws) == len(keys)
    assert len(values) == 12 * len(keys)  # no stream is another's, shifted by a few draws


def test_an_empty_batch_stays_empty() -> None:
    out = augment(batch_of([]), HALF, seed=0, epoch=1)
    assert out["image"].shape == (0, 6, 5)
