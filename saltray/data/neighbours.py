"""Which tiles lie side by side in the mosaic that they were cut from, told by their edges.

The contest's tiles were cut from shared mosaics, and where one tile ends the next goes on. Two such tiles on
both sides of a split flatter the validation score: the model has seen the rest of the picture.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from saltray.config import Split
from saltray.data.dataset import Table, decode_local

MATCH_RATIO = 0.5
"""A match is believed when its distance is below this part of the second best's (Lowe 2004). On the contest's
tiles, where the first tile's edge has both salt and none, the masks of believed pairs agree in 0.84 (side by
side) and 0.93 (one below the other) of the edge's pixels; those of pairs with a ratio below 0.9 in 0.76 and
0.61, random pairs in 0.52."""

FLAT = 3.0
"""Standard deviation, in grey levels, below which an edge has nothing to be recognised by."""

MOST_COMPARED = 50_000
"""Tiles, beyond which no neighbours across a split are looked for: each edge is compared with every other."""

_CHUNK = 2048  # rows of the table of all pairs that are held at once

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


def read_groups(table: Table, split: Split) -> Ints | None:
    """Decode a table's labelled tiles and tell which of them must share a fold; None where none must.

    An image that cannot be read has no neighbours.
    """
    if split == "coverage":
        return None
    tiles, _ = decode_local(table)
    return groups_in(table, tiles["row"], find_neighbours(tiles["image"]))


def groups_in(table: Table, rows: Ints, pairs: Ints) -> Ints:
    """Number the groups of a table's tiles, int64 (tiles,).

    Args:
        table: of all tiles.
        rows: by which the table knows the tiles that were compared.
        pairs: (n, 2), positions among those.
    """
    return groups_of(len(table.rows), pd.Index(table.rows["row"]).get_indexer(rows)[pairs])


def groups_of(tiles: int, pairs: Ints) -> Ints:
    """Number the groups that pairs (n, 2) join: int64 (tiles,); a tile in no pair is a group of its own."""
    # Imported where it is used: few runs keep neighbours together.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(tiles, tiles))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)


def find_neighbours(images: npt.NDArray[np.uint8]) -> Ints:
    """Find pairs of tiles that seem to lie side by side, or one below the other, in the same mosaic.

    Each tile's right edge is compared with all left edges, its lower with all upper ones, by correlation
    over the edge's pixels (tiles differ in brightness and contrast). Both edges are first moved half a pixel
    towards each other, along their own slope. A pair counts where each is the other's best, clearly before
    the second.

    Args:
        images: uint8 (tiles, height, width).

    Returns:
        int64 (pairs, 2), positions of the left or upper tile and of the other.
    """
    if len(images) < 2:  # of a folder in which no tile can be read, say
        return np.empty((0, 2), np.int64)
    found = []
    for pixels in (images, images.transpose(0, 2, 1)):
        rows = pixels[:, :, [-1, -2, 0, 1]].astype(np.float32)
        found.append(_match(1.5 * rows[..., 0] - 0.5 * rows[..., 1], 1.5 * rows[..., 2] - 0.5 * rows[..., 3]))
    return np.unique(np.concatenate(found), axis=0)


def beside_others(images: npt.NDArray[np.uint8], part: Ints) -> npt.NDArray[np.bool_]:
    """Tell which tiles have a neighbour in another part (`find_neighbours`).

    Args:
        images: uint8 (tiles, height, width).
        part: of each tile, int64 (tiles,), such as its fold.

    Returns:
        bool (tiles,).
    """
    pairs = find_neighbours(images)
    found = np.zeros(len(images), np.bool_)
    found[pairs[part[pairs[:, 0]] != part[pairs[:, 1]]]] = True
    return found


class _Best(NamedTuple):
    """Of each edge: who fits best, and at what distance (1 - correlation) the best and the second are."""

    place: Ints
    first: Floats
    second: Floats


def _match(ends: Floats, starts: Floats) -> Ints:
    """Return the pairs (end, start) that are each other's best by a clear margin; edges (tiles, pixels)."""
    ends, flat_ends = _standardise(ends)
    starts, flat_starts = _standardise(starts)
    forward = _nearest(ends, flat_ends, starts, flat_starts)
    back = _nearest(starts, flat_starts, ends, flat_ends)
    here = np.arange(len(ends))
    second = np.minimum(forward.second, back.second[forward.place])
    believed = (back.place[forward.place] == here) & (forward.first < MATCH_RATIO * second)
    return np.asarray(np.stack([here, forward.place], axis=1)[believed], np.int64)


def _standardise(edges: Floats) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Return edges of mean 0 and length 1, and which are too flat to be compared."""
    edges = edges - edges.mean(axis=1, keepdims=True)
    flat = edges.std(axis=1) < FLAT
    return edges / np.maximum(np.linalg.norm(edges, axis=1, keepdims=True), 1e-6), flat


def _nearest(
    edges: Floats, flat: npt.NDArray[np.bool_], others: Floats, flat_others: npt.NDArray[np.bool_]
) -> _Best:
    """Find each edge's best partner; a flat edge is at distance 2 of all, as is a tile of itself."""
    parts = []
    for start in range(0, len(edges), _CHUNK):
        here = slice(start, start + _CHUNK)
        distance = 1 - edges[here] @ others.T
        distance[flat[here]] = 2
        distance[:, flat_others] = 2
        rows = np.arange(len(distance))
        distance[rows, start + rows] = 2
        place = distance.argmin(axis=1)
        first = distance[rows, place]
        distance[rows, place] = 2
        parts.append(_Best(place.astype(np.int64), first, distance.min(axis=1)))
    return _Best(*(np.concatenate(column) for column in zip(*parts, strict=True)))
