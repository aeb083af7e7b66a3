"""The contest's run-length code: `start length` pairs over the pixels in column-major order.

Pixels are counted from 1, top to bottom, then left to right; the runs are sorted and do not overlap; an
empty mask is an empty string.
"""

import numpy as np
import numpy.typing as npt

from saltray.config import TILE


def encode(mask: npt.NDArray[np.bool_]) -> str:
    """Encode a boolean mask of shape (height, width)."""
    pixels = np.concatenate([[False], mask.astype(bool).flatten(order="F"), [False]])
    edges = np.flatnonzero(pixels[1:] != pixels[:-1])
    starts, ends = edges[::2], edges[1::2]
    runs = np.stack([starts + 1, ends - starts], axis=1)
    return " ".join(map(str, runs.ravel()))


def decode(code: str, shape: tuple[int, int] = (TILE, TILE)) -> npt.NDArray[np.bool_]:
    """Decode to a boolean mask of `shape` (height, width).

    Raises:
        ValueError: the code is not made of pairs of whole numbers, a run is empty or leaves the tile, or
            the runs are not sorted or overlap. The message shows the offending run.
    """
    starts, ends = _runs(code, shape[0] * shape[1])
    # Ones at the starts, minus ones behind the ends: the running sum is the mask.
    steps = np.zeros(shape[0] * shape[1] + 1, np.int8)
    np.add.at(steps, starts, 1)
    np.add.at(steps, ends, -1)
    return np.cumsum(steps[:-1], dtype=np.int8).astype(bool).reshape(shape, order="F")


def area(code: str, shape: tuple[int, int] = (TILE, TILE)) -> int:
    """Count the mask's pixels without drawing it; raises as `decode` does."""
    starts, ends = _runs(code, shape[0] * shape[1])
    return int((ends - starts).sum())


def _runs(code: str, pixels: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return each run's first pixel, and the one behind its last, counted from 0."""
    words = code.split()
    if not all(word.isascii() and word.isdigit() and len(word) < 10 for word in words):
        raise ValueError(f"malformed run-length code {_short(code)!r}: expected pairs of whole numbers")
    if len(words) % 2:
        raise ValueError(f"malformed run-length code {_short(code)!r}: {len(words)} numbers, not in pairs")
    numbers = np.array(words, dtype=np.int64)
    starts, lengths = numbers[::2] - 1, numbers[1::2]
    ends = starts + lengths
    wrong = (starts < 0) | (lengths < 1) | (ends > pixels)
    if wrong.any():
        i = int(np.argmax(wrong))
        raise ValueError(f"run '{starts[i] + 1} {lengths[i]}' lies outside the tile's pixels 1 to {pixels}")
    crossed = starts[1:] < ends[:-1]
    if crossed.any():
        i = int(np.argmax(crossed)) + 1
        raise ValueError(f"run '{starts[i] + 1} {lengths[i]}' overlaps the run before it, or is out of order")
    return starts, ends


def _short(code: str) -> str:
    return code if len(code) <= 60 else code[:57] + "..."
