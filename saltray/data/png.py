"""The PNG files of tiles: checked, and decoded to uint8 arrays."""

import io
import struct

import numpy as np
import numpy.typing as npt
from PIL import Image

from saltray.config import TILE

LIMIT = 2**20
"""Bytes; a 101x101 PNG of 16-bit RGB has at most 62 kB."""


def decode_image(data: bytes) -> npt.NDArray[np.uint8]:
    """Decode an image PNG (the contest's are RGB with R=G=B) to uint8 (101, 101).

    Raises:
        ValueError: the data is no undamaged 101x101 PNG of 8 bits a channel.
    """
    image, depth = _open_png(data), data[24]
    if depth > 8 or image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
        raise ValueError(f"PNG of mode {image.mode}, {depth} bits a channel: expected 8-bit grey or RGB")
    return np.asarray(image.convert("L"), np.uint8)


def decode_mask(data: bytes) -> npt.NDArray[np.uint8]:
    """Decode a mask PNG (16-bit, or 8-bit where empty) to uint8 (101, 101) in {0, 1}; raises likewise."""
    image = _open_png(data)
    # Colour, palette and transparency say nothing of salt: their brightness does.
    pixels = np.asarray(image.convert("L") if image.mode in ("LA", "P", "PA", "RGB", "RGBA") else image)
    return (pixels > 0).astype(np.uint8)


def _open_png(data: bytes) -> Image.Image:
    if not data:
        raise ValueError("an empty file (0 bytes)")
    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 33:
        raise ValueError("not a PNG image" if len(data) >= 33 else "a truncated file")
    # The header is read by hand: a huge image is refused before any library makes room for it.
    width, height = struct.unpack(">II", data[16:24])
    if (width, height) != (TILE, TILE):
        raise ValueError(f"{width}x{height} pixels: expected {TILE}x{TILE}")
    if len(data) > LIMIT:
        raise ValueError(f"more than {LIMIT} bytes for {TILE}x{TILE} pixels")
    try:
        image = Image.open(io.BytesIO(data), formats=["PNG"])
        if image.size != (TILE, TILE):
            raise ValueError("a second header")
        image.load()
        Image.open(io.BytesIO(data), formats=["PNG"]).verify()  # load() checks no pixel data's checksum
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"a damaged PNG: {error}") from None
    return image
