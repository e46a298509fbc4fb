"""Read pictures by Pillow, in grey or RGB, and turn them into arrays."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from pfedgpa_app.core.settings import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

BILINEAR = 2  # Pillow's constant; Pillow takes long to import


def decoder() -> str:
    """Name what decodes pictures here: another may do it a little differently."""
    return f"Pillow {version('pillow')}, {platform.machine()}"


def recoloured(images: np.ndarray, channels: int) -> np.ndarray:
    """Convert images [N, C, H, W] to grey (one channel) or colour (three), as Pillow does.

    Other numbers of channels are left as they are.
    """
    from PIL import Image

    if {images.shape[1], channels} != {1, 3}:
        return images
    if channels == 3:
        return images.repeat(3, axis=1)
    grey = [Image.fromarray(each.transpose(1, 2, 0)).convert("L") for each in images]
    return np.stack([np.asarray(each)[None] for each in grey])


def eight_bits(image: Image) -> Image:
    """Convert ``image`` to grey or RGB, of 8 bits a channel, without its transparency.

    Raises:
        ValueError: nothing tells which values are black and white.
    """
    from PIL import ExifTags, Image

    if image.mode in ("1", "L"):
        return image.convert("L")
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM"):
        bits = image.getexif()[ExifTags.Base.BitsPerSample] if image.format == "TIFF" else 16
        return Image.fromarray((np.asarray(image) >> (bits - 8)).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels have no defined range (mode {image.mode}); save it with 8 or 16 bits"
        )
    return image.convert("RGB")


def read_image(file: Path | IO[bytes], name: str = "") -> Image:
    """Read an image in grey or RGB, upright; ``name`` is how messages call it.

    Raises:
        DataError: it cannot be read, or is too large.
    """
    from PIL import Image, ImageOps

    name = name or str(file)
    try:
        with Image.open(file) as opened:
            opened.load()
            with suppress(Exception):  # damaged EXIF does not tell which side is up
                ImageOps.exif_transpose(opened, in_place=True)
            return eight_bits(opened)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"{name}: has more than {Image.MAX_IMAGE_PIXELS:,} pixels: make it smaller, or "
            "remove it"
        ) from error
    except Exception as error:  # Pillow raises all kinds on damaged files
        raise DataError(
            f"{name}: cannot be read as an image: {str(error) or type(error).__name__}; mend it, "
            "or remove it"
        ) from error


def pixels_of(image: Image) -> np.ndarray:
    """Return an image as [C, H, W] uint8; C is 1 if it is grey."""
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def decoded(files: Iterable[tuple[Path | IO[bytes], str]], number: int, size: int) -> np.ndarray:
    """Read ``number`` images as [N, C, H, W] uint8: all in colour if any is.

    Args:
        files: each with its name, for messages.
        size: the side of the squares that images are resized to; 0: they stay as they are.

    Raises:
        DataError: one cannot be read, or is of another size than the first.
    """
    from PIL import Image

    with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
        images, of_first = np.empty((0, 0, 0, 0), dtype=np.uint8), ""
        for i, (file, name) in enumerate(files):
            picture = read_image(file, name)
            image = pixels_of(picture.resize((size, size), BILINEAR) if size else picture)
            if i == 0:
                images, of_first = np.empty((number, *image.shape), dtype=np.uint8), name
            if image.shape[1:] != images.shape[2:]:
                sizes = ["×".join(map(str, s)) for s in (image.shape[1:], images.shape[2:])]
                raise DataError(
                    f"{name}: is {sizes[0]} (H×W) but {of_first} is {sizes[1]}; set image-size to "
                    "resize all images alike"
                )
            if len(image) > images.shape[1]:  # the first one in colour
                images = images.repeat(len(image), axis=1)
            images[i] = image
    return images
