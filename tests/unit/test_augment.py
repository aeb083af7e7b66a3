import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform, gaussian_filter

from saltray.config import IGNORED, TILE, AugmentConfig
from saltray.data.augment import Batch, augment, generator, mixup

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


EVERYTHING = AugmentConfig(flip=0.5, move=0.6, tone=0.6, cutout=0.6)


def tiles_of(rows: list[int]) -> Batch:
    rng = np.random.default_rng(0)
    shape = (len(rows), TILE, TILE)
    masks = np.zeros(shape, np.uint8)
    masks[:, 20:70, 30:] = 1
    return {"row": np.array(rows), "image": rng.integers(0, 256, shape).astype(np.uint8), "mask": masks}


def test_everything_together_still_does_not_depend_on_the_batch() -> None:
    rows = [12, 4_000_000_000, 3, 0, 77, 5]
    batch = tiles_of(rows)
    together = augment(batch, EVERYTHING, seed=2, epoch=3)
    for i in range(len(rows)):
        alone = augment({name: values[i : i + 1] for name, values in batch.items()}, EVERYTHING, 2, 3)
        for name in ("image", "mask"):
            np.testing.assert_array_equal(alone[name][0], together[name][i])


def test_everything_keeps_the_input_the_types_and_binary_masks() -> None:
    batch = tiles_of(list(range(30)))
    for values in batch.values():
        values.flags.writeable = False
    out = augment(batch, EVERYTHING, seed=0, epoch=1)
    for name in ("image", "mask"):
        assert out[name].dtype == np.uint8 and out[name].shape == batch[name].shape
    assert set(np.unique(out["mask"])) == {0, 1}
    assert len({image.tobytes() for image in out["image"]}) == 30


def test_one_change_switched_on_leaves_the_others_draws() -> None:
    batch = tiles_of(list(range(40)))
    flipped = augment(batch, AugmentConfig(), 0, 1)
    toned = augment(batch, AugmentConfig(tone=0.5), 0, 1)
    np.testing.assert_array_equal(toned["mask"], flipped["mask"])
    same = [np.array_equal(a, b) for a, b in zip(toned["image"], flipped["image"], strict=True)]
    assert 10 < sum(same) < 30


def test_move_agrees_with_scipy() -> None:
    rows = list(range(8))
    batch = tiles_of(rows)
    batch["image"] = np.stack([gaussian_filter(t.astype(float), 2) for t in batch["image"]]).astype(np.uint8)
    config = AugmentConfig(flip=0, move=1, shift=0.2, scale=0.3)
    out = augment(batch, config, seed=4, epoch=2)
    for i, row in enumerate(rows):
        draws = generator(4, 2, row).random(5)
        zoom, shifts = 1 + 0.3 * (2 * draws[2] - 1), 0.2 * TILE * (2 * draws[3:5] - 1)
        offset = 50 - zoom * 50 + shifts
        for name in ("image", "mask"):
            expected = affine_transform(
                batch[name][i].astype(float), [zoom, zoom], offset, order=1, mode="mirror"
            )
            if name == "image":
                assert np.abs(out[name][i] - expected).max() <= 0.5 + 1e-3  # rounded once
            else:
                sure = np.abs(expected - 0.5) > 1e-4
                np.testing.assert_array_equal(out[name][i][sure], (expected >= 0.5)[sure])


def test_tone_is_one_rising_curve_for_the_whole_tile() -> None:
    batch = tiles_of(list(range(10)))
    batch["image"][:] = (np.arange(TILE * TILE) % 256).reshape(TILE, TILE)
    config = AugmentConfig(flip=0, tone=1, brightness=0.2, contrast=0.3, gamma=0.4)
    out = augment(batch, config, seed=0, epoch=1)
    np.testing.assert_array_equal(out["mask"], batch["mask"])
    for i, image in enumerate(out["image"]):
        curve = image.reshape(-1)[:256].astype(int)
        np.testing.assert_array_equal(image, curve[batch["image"][i]])
        gamma, contrast, brightness = 2 * generator(0, 1, i).random(9)[6:9] - 1
        grey = np.linspace(0, 1, 256) ** (1.4**gamma)
        expected = (grey - 0.5) * (1 + 0.3 * contrast) + 0.5 + 0.2 * brightness
        assert np.abs(curve - 255 * expected.clip(0, 1)).max() <= 0.5 + 1e-6
    assert len({image.tobytes() for image in out["image"]}) == 10


def test_cutout_is_a_grey_square_and_no_more() -> None:
    batch = tiles_of(list(range(60)))
    batch["image"] = np.full_like(batch["image"], 7)
    out = augment(batch, AugmentConfig(flip=0, cutout=1, cutout_size=0.4), seed=0, epoch=1)
    np.testing.assert_array_equal(out["mask"], batch["mask"])
    sides = []
    for image in out["image"]:
        ys, xs = np.nonzero(image == 128)
        assert set(np.unique(image)) <= {7, 128}
        if len(ys):
            assert len(ys) == (np.ptp(ys) + 1) * (np.ptp(xs) + 1)
            sides.append(max(np.ptp(ys), np.ptp(xs)) + 1)
    assert max(sides) <= 0.4 * TILE + 1 and max(sides) > 25 and min(sides) < 15


def test_mixup_mixes_each_tile_with_its_partner() -> None:
    torch.manual_seed(0)
    images = torch.rand(6, 1, 4, 4)
    mixed, partner, share = mixup(images, alpha=1.0)
    assert partner is not None and sorted(partner.tolist()) == list(range(6))
    assert 0 < share < 1
    torch.testing.assert_close(mixed, share * images + (1 - share) * images[partner])
    assert mixup(images, alpha=0)[0] is images


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixups_share_has_the_betas_variance(alpha: float) -> None:
    torch.manual_seed(0)
    shares = [mixup(torch.zeros(1, 1, 1, 1), alpha)[2] for _ in range(2000)]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.03)
    assert np.var(shares) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_ignored_pixels_go_where_the_nearest_ones_do() -> None:
    rng = np.random.default_rng(2)
    blobs = gaussian_filter(rng.normal(size=(30, TILE, TILE)), (0, 6, 6))
    mask = np.select([blobs > 0.02, blobs > 0], [1, IGNORED], 0).astype(np.uint8)
    image = rng.integers(0, 256, mask.shape).astype(np.uint8)
    config = AugmentConfig(flip=0.5, move=1.0, tone=0.5, cutout=0.5)
    rows = np.arange(30)
    moved = augment({"row": rows, "image": image, "mask": mask}, config, 3, 1)["mask"]
    least, most = (
        augment({"row": rows, "image": image, "mask": salt.astype(np.uint8)}, config, 3, 1)["mask"]
        for salt in (mask == 1, mask > 0)
    )
    assert moved.dtype == np.uint8 and set(np.unique(moved)) == {0, 1, IGNORED}
    # Salt is where it would be if none of what is ignored were salt, and nowhere but where it could be.
    known = moved != IGNORED
    assert (moved[known & (least == 1)] == 1).all() and (moved[known & (most == 0)] == 0).all()
    ignored = augment(
        {"row": rows, "image": image, "mask": (mask == IGNORED).astype(np.uint8)}, config, 3, 1
    )["mask"]
    # Interpolation rounds an area to within a pixel of its border, as the nearest pixel does.
    assert ((moved == IGNORED) == (ignored == 1)).mean() > 0.97
    assert (moved == IGNORED).mean() == pytest.approx((mask == IGNORED).mean(), rel=0.2)
    # Beside salt alone, nothing that is unknown turns into "no salt".
    without = augment({"row": rows, "image": image, "mask": np.maximum(mask, 1)}, config, 3, 1)["mask"]
    assert set(np.unique(without)) == {1, IGNORED}
