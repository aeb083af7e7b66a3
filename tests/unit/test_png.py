import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from saltray.config import TILE
from saltray.data.png import decode_image, decode_mask


def png(pixels: npt.NDArray[np.generic], mode: str | None = None) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(buffer, "PNG")
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def header(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))


GREY = np.random.default_rng(0).integers(0, 256, (TILE, TILE), dtype=np.uint8)
RGB_PNG = png(np.repeat(GREY[:, :, None], 3, axis=2))
SALT = GREY > 128
MASK_PNG = png(SALT.astype(np.uint16) * 65535)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA"])
def test_image_of_every_mode_gives_its_grey(mode: str) -> None:
    image = decode_image(png(GREY, mode))
    assert image.dtype == np.uint8 and np.array_equal(image, GREY)


@pytest.mark.parametrize("mode", ["1", "P"])
def test_image_of_few_colours_gives_its_grey(mode: str) -> None:
    assert np.array_equal(decode_image(png(SALT.astype(np.uint8) * 255, mode)), SALT * 255)


@pytest.mark.parametrize(("depth", "colour", "samples"), [(16, 0, 1), (16, 2, 3)])
def test_image_of_16_bits_is_refused(depth: int, colour: int, samples: int) -> None:
    lines = (b"\0" + b"\x01\xff" * samples * TILE) * TILE
    data = RGB_PNG[:8] + header(TILE, TILE, depth, colour) + chunk(b"IDAT", zlib.compress(lines))
    with pytest.raises(ValueError, match="8"):
        decode_image(data + chunk(b"IEND", b""))


@pytest.mark.parametrize(
    ("pixels", "mode"),
    [
        (SALT.astype(np.uint16) * 65535, None),
        (SALT.astype(np.uint16), None),
        (SALT.astype(np.uint8) * 255, None),
        (SALT.astype(np.uint8), None),
        (SALT.astype(np.uint8) * 255, "1"),
        (SALT.astype(np.uint8) * 255, "RGB"),
    ],
)
def test_mask_of_every_depth_gives_the_salt(pixels: npt.NDArray[np.generic], mode: str | None) -> None:
    mask = decode_mask(png(pixels, mode))
    assert mask.dtype == np.uint8 and np.array_equal(mask, SALT)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_constant_masks(dtype: type[np.generic]) -> None:
    empty = np.zeros((TILE, TILE), dtype)
    assert decode_mask(png(empty)).sum() == 0
    assert decode_mask(png(~empty)).sum() == TILE * TILE


def test_image_and_mask_are_not_transposed() -> None:
    pixels = np.zeros((TILE, TILE), np.uint8)
    pixels[3, 70] = 255
    assert decode_image(png(pixels))[3, 70] == 255 and decode_mask(png(pixels))[3, 70] == 1


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(GREY).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize("decode", [decode_image, decode_mask])
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", r"empty file \(0 bytes\)"),
        (b"hello", "truncated"),
        (b"not an image at all, though long enough for one", "not a PNG"),
        (jpeg(), "not a PNG"),
        (b"\xff" + RGB_PNG[1:], "not a PNG"),
        (png(GREY[:, :100]), "100x101 pixels: expected 101x101"),
        (png(GREY[:64]), "101x64 pixels: expected 101x101"),
        (png(np.zeros((128, 128), np.uint16)), "128x128 pixels"),
        (RGB_PNG + bytes(2**20), "more than 1048576 bytes"),
        (RGB_PNG[:8] + header(TILE, TILE) + chunk(b"IEND", b""), "damaged"),
        (RGB_PNG[:33] + bytes(200), "damaged"),
    ],
)
def test_bad_png_is_refused(
    decode: Callable[[bytes], npt.NDArray[np.uint8]], data: bytes, expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        decode(data)


@pytest.mark.parametrize("decode", [decode_image, decode_mask])
@pytest.mark.parametrize(("width", "height"), [(10**9, 10**9), (10**9, TILE), (TILE, 2**32 - 1), (0, 0)])
def test_absurd_size_is_refused_without_decoding(
    decode: Callable[[bytes], npt.NDArray[np.uint8]],
    width: int,
    height: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("the image was opened"))
    with pytest.raises(ValueError, match=f"{width}x{height} pixels"):
        decode(RGB_PNG[:8] + header(width, height) + RGB_PNG[33:])


@pytest.mark.parametrize("side", [200, 30_000])
def test_second_header_does_not_smuggle_a_size(side: int) -> None:
    with pytest.raises(ValueError, match=r"PNG|pixels"):
        decode_image(RGB_PNG[:33] + header(side, side) + RGB_PNG[33:])


@pytest.mark.parametrize(("data", "decode"), [(RGB_PNG, decode_image), (MASK_PNG, decode_mask)])
def test_truncated_png_is_refused(data: bytes, decode: Callable[[bytes], npt.NDArray[np.uint8]]) -> None:
    for length in {*range(60), *range(60, len(data) - 40, max(1, len(data) // 200)), len(data) - 40}:
        with pytest.raises(ValueError, match=r"truncated|damaged|empty file"):
            decode(data[:length])
    # Nothing but the checksums and the end mark missing: refused or read, but never read wrongly.
    for length in range(len(data) - 40, len(data)):
        try:
            pixels = decode(data[:length])
        except ValueError:
            continue
        assert np.array_equal(pixels, decode(data))


@pytest.mark.parametrize(("data", "decode"), [(RGB_PNG, decode_image), (MASK_PNG, decode_mask)])
def test_damaged_byte_never_changes_pixels_silently(
    data: bytes, decode: Callable[[bytes], npt.NDArray[np.uint8]]
) -> None:
    whole = decode(data)
    silent = []
    for place in {*range(8, 60), *range(60, len(data), max(1, len(data) // 100)), *range(-300, -12, 3)}:
        damaged = bytearray(data)
        damaged[place] ^= 0xFF
        try:
            pixels = decode(bytes(damaged))
        except ValueError:
            continue
        if not np.array_equal(pixels, whole):
            silent.append(place)
    assert silent == []
