"""Random changes of training tiles: NumPy batch -> NumPy batch, for Ray Data to map over the stream.

Each tile draws from its own counter-based random stream (Philox; Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3"), keyed by seed and epoch and counted by the tile's row. So a tile's change
does not depend on the batch, block, worker or machine that it meets, and the next epoch's is another.
Mixup alone needs a second tile: the training loop does it, on its batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from saltray.config import IGNORED, AugmentConfig

# Decoding and augmentation run in processes of Ray Data's, which start a second sooner without PyTorch.
if TYPE_CHECKING:
    from torch import Tensor

Batch = dict[str, npt.NDArray[Any]]

COLUMNS = ("image", "mask", "z")
"""What training needs of a tile."""

_DRAWS = 13
"""Numbers that each tile draws, each with its fixed use: switching one change on leaves the others' draws."""


def generator(seed: int, epoch: int, row: int) -> np.random.Generator:
    """Return the random stream of one tile in one epoch."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, row]))


def augment(batch: Batch, config: AugmentConfig, seed: int, epoch: int) -> Batch:
    """Return the batch with its tiles changed at random; the input is left as it is.

    Args:
        batch: `row` int64 (tiles,), `image` uint8 and `mask` uint8 in {0, 1, IGNORED}, both (tiles, height,
            width), and any other columns.
        config: the probabilities and sizes.
        seed: the trial's seed.
        epoch: counted from 1.
    """
    draws = np.array([generator(seed, epoch, int(row)).random(_DRAWS) for row in batch["row"]])
    draws = draws.reshape(-1, _DRAWS)
    # A copy on the way: what follows changes tiles in place.
    image, mask = (_flip(batch[name], draws[:, 0] < config.flip) for name in ("image", "mask"))
    for i in np.flatnonzero(draws[:, 1] < config.move):
        image[i], mask[i] = _move(image[i], mask[i], config, draws[i, 2:5])
    for i in np.flatnonzero(draws[:, 5] < config.tone):
        image[i] = _tone_table(config, draws[i, 6:9])[image[i]]
    for i in np.flatnonzero(draws[:, 9] < config.cutout):
        _cut_out(image[i], config.cutout_size, draws[i, 10:13])
    return batch | {"image": image, "mask": mask}


def augment_for_training(batch: Batch, config: AugmentConfig, seed: int, epoch: int) -> Batch:
    """Augment, and keep only what training needs."""
    changed = augment({name: batch[name] for name in ("row", *COLUMNS)}, config, seed, epoch)
    return {name: changed[name] for name in COLUMNS}


def mixup(images: Tensor, alpha: float) -> tuple[Tensor, Tensor | None, float]:
    """Mix each image of a batch with another one's (Zhang et al. 2018, arXiv:1710.09412).

    The losses against both masks are to be mixed likewise, so masks stay binary. Draws from torch's global
    random numbers.

    Args:
        images: float (tiles, channels, height, width).
        alpha: of the beta distribution that the share is drawn from; 0 mixes nothing.

    Returns:
        The mixed images, each one's partner (int64 (tiles,); None where nothing is mixed), and the share of
        the image itself, in [0, 1].
    """
    if alpha == 0:
        return images, None, 1.0
    import torch

    share = float(torch.distributions.Beta(alpha, alpha).sample())
    partner = torch.randperm(len(images)).to(images.device)
    return torch.lerp(images[partner], images, share), partner, share


def _flip(tiles: npt.NDArray[np.uint8], which: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """Return a copy with the chosen tiles mirrored left to right: the last axis of (tiles, height, width)."""
    mirrored = tiles.copy()
    mirrored[which] = tiles[which, :, ::-1]
    return mirrored


def _move(
    image: npt.NDArray[np.uint8], mask: npt.NDArray[np.uint8], config: AugmentConfig, draws: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Shift and scale one tile (height, width) by three numbers in [0, 1), interpolated linearly.

    An ignored pixel of the mask goes where it is the nearest one; elsewhere the known pixels decide.
    """
    zoom = 1 + config.scale * _centred(draws[0])
    axes = []
    for size, draw in zip(image.shape, draws[1:], strict=True):
        middle = (size - 1) / 2
        source = middle + zoom * (np.arange(size) - middle) + config.shift * size * _centred(draw)
        axes.append(_neighbours(source, size))
    # IGNORED is 2: it has not the bit of salt.
    pixels, salt = _sample(image, axes), _sample(mask & np.uint8(1), axes)
    moved = (salt >= 0.5).astype(np.uint8)
    if (ignored := mask == IGNORED).any():
        known = 1 - _sample(ignored.astype(np.uint8), axes)
        moved = np.where(_nearest(mask, axes) == IGNORED, np.uint8(IGNORED), salt >= 0.5 * known)
    return np.rint(pixels).astype(np.uint8), moved.astype(np.uint8)


_Axis = tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.float32]]


def _neighbours(source: npt.NDArray[np.float64], size: int) -> _Axis:
    """Return the pixels around each place on an axis, mirrored at its ends, and the second one's weight."""
    below = np.floor(source).astype(np.intp)
    weight = (source - below).astype(np.float32)

    def mirror(i: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
        period = max(2 * (size - 1), 1)
        return (size - 1) - np.abs((i % period) - (size - 1))

    return mirror(below), mirror(below + 1), weight


def _sample(tile: npt.NDArray[np.uint8], axes: list[_Axis]) -> npt.NDArray[np.float32]:
    """Interpolate a tile (height, width) at a grid of places, axis by axis."""
    (above, below, down), (left, right, along) = axes
    pixels = tile.astype(np.float32)
    rows = pixels[above]
    rows += (pixels[below] - rows) * down[:, None]
    first = rows[:, left]
    first += (rows[:, right] - first) * along
    return first


def _nearest(tile: npt.NDArray[np.uint8], axes: list[_Axis]) -> npt.NDArray[np.uint8]:
    """Take the nearest pixel of a tile (height, width) at a grid of places."""
    down, along = (np.where(weight < 0.5, first, second) for first, second, weight in axes)
    return tile[down][:, along]


def _tone_table(config: AugmentConfig, draws: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Return the new value of each of the 256 values, from three numbers in [0, 1)."""
    exponent = (1 + config.gamma) ** _centred(draws[0])
    factor, shift = 1 + config.contrast * _centred(draws[1]), config.brightness * _centred(draws[2])
    values = (np.arange(256) / 255) ** exponent
    values = (values - 0.5) * factor + 0.5 + shift
    table: npt.NDArray[np.uint8] = np.rint(values.clip(0, 1) * 255).astype(np.uint8)
    return table


def _cut_out(image: npt.NDArray[np.uint8], largest: float, draws: npt.NDArray[Any]) -> None:
    """Turn a square of an image (height, width) mid-grey, in place.

    Three numbers in [0, 1) give its side and centre; it may reach over the border (DeVries and Taylor 2017,
    arXiv:1708.04552).
    """
    height, width = image.shape
    half = draws[0] * largest * height / 2
    y, x = draws[1] * height, draws[2] * width
    top, left = max(0, round(y - half)), max(0, round(x - half))
    image[top : max(0, round(y + half)), left : max(0, round(x + half))] = 128


def _centred(draw: float) -> float:
    """Map [0, 1) to [-1, 1)."""
    return 2 * draw - 1
