from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from saltray.config import TILE
from saltray.contest import rle

TGS = Path(__file__).parents[3] / "shared" / "tgs"


def slow_encode(mask: npt.NDArray[np.bool_]) -> str:
    height, width = mask.shape
    pixels = [(row, column) for column in range(width) for row in range(height)]
    words, position = [], 1
    for salt, group in groupby(pixels, key=lambda p: bool(mask[p])):
        length = len(list(group))
        if salt:
            words += [str(position), str(length)]
        position += length
    return " ".join(words)


def slow_decode(code: str, shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
    mask, words = np.zeros(shape, bool), [int(word) for word in code.split()]
    for start, length in zip(words[::2], words[1::2], strict=True):
        for pixel in range(start - 1, start - 1 + length):
            mask[pixel % shape[0], pixel // shape[0]] = True
    return mask


masks = arrays(bool, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9))


@given(masks)
def test_agrees_with_a_slow_loop_and_comes_back(mask: npt.NDArray[np.bool_]) -> None:
    code, shape = rle.encode(mask), (mask.shape[0], mask.shape[1])
    assert code == slow_encode(mask)
    decoded = rle.decode(code, shape)
    assert decoded.dtype == bool
    np.testing.assert_array_equal(decoded, mask)
    np.testing.assert_array_equal(slow_decode(code, shape), mask)
    assert rle.area(code, shape) == mask.sum()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), max_size=6))
def test_any_sorted_runs_decode_even_adjacent_ones(gaps_and_lengths: list[tuple[int, int]]) -> None:
    words, position = [], 1
    for gap, length in gaps_and_lengths:
        words += [str(position + gap), str(length)]
        position += gap + length
    code, shape = " ".join(words), (7, 6)
    np.testing.assert_array_equal(rle.decode(code, shape), slow_decode(code, shape))


def test_counts_from_one_down_the_columns() -> None:
    mask = rle.decode("2 3", (3, 2))
    np.testing.assert_array_equal(mask, [[False, True], [True, False], [True, False]])


@pytest.mark.parametrize(("value", "code"), [(False, ""), (True, f"1 {TILE * TILE}")])
def test_constant_tiles(value: bool, code: str) -> None:
    mask = np.full((TILE, TILE), value)
    assert rle.encode(mask) == code
    np.testing.assert_array_equal(rle.decode(code), mask)


def test_encodes_masks_of_other_types_by_truth() -> None:
    mask = np.array([[0, 65535], [65535, 0]], np.uint16)
    assert rle.encode(mask > 0) == "2 2"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("1", "1 numbers, not in pairs"),
        ("1 2 3", "3 numbers, not in pairs"),
        ("5 0", "'5 0' lies outside"),
        ("0 1", "'0 1' lies outside"),
        ("10202 1", "'10202 1' lies outside the tile's pixels 1 to 10201"),
        ("1 1 10201 2", "'10201 2' lies outside"),
        ("999999999 999999999", "lies outside"),
        ("1 5 5 1", "'5 1' overlaps"),
        ("1 5 1 5", "'1 5' overlaps"),
        ("50 2 10 2", "'10 2' overlaps the run before it, or is out of order"),
        ("1 a", "'1 a': expected pairs of whole numbers"),
        ("nan", "expected pairs of whole numbers"),
        ("-1 5", "expected pairs of whole numbers"),
        ("5 -1", "expected pairs of whole numbers"),
        ("+5 1", "expected pairs of whole numbers"),
        ("1_0 1", "expected pairs of whole numbers"),
        ("1.0 1", "expected pairs of whole numbers"),
        ("1e1 1", "expected pairs of whole numbers"),
        ("1,1", "expected pairs of whole numbers"),
        ("٣ 1", "expected pairs of whole numbers"),
        ("² 1", "expected pairs of whole numbers"),
        ("18446744073709551617 1", "expected pairs of whole numbers"),
    ],
)
def test_malformed_code_is_refused_with_its_run(code: str, message: str) -> None:
    for read in (rle.decode, rle.area):
        with pytest.raises(ValueError) as error:
            read(code)
        assert message in str(error.value)


def test_long_codes_are_cut_in_messages() -> None:
    with pytest.raises(ValueError) as error:
        rle.decode("1 1 " * 5000 + "x")
    assert len(str(error.value)) < 200


def test_real_codes_come_back() -> None:
    if not (TGS / "train.csv").is_file():
        pytest.skip("the contest's tiles are not here")
    codes = pd.read_csv(TGS / "train.csv", keep_default_na=False)["rle_mask"]
    assert len(codes) > 1000
    for code in codes:
        mask = rle.decode(code)
        assert rle.encode(mask) == code
        assert rle.area(code) == mask.sum()
