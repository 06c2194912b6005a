"""Decoding of images on the host, to squares of bytes, uint8 [side, side, 3].

Pillow decodes JPEG, PNG and other formats without holding Python's lock, so that threads run in
parallel. Its bilinear filter is antialiased. Grey and CMYK images become RGB; EXIF orientation is
ignored, as is usual for ImageNet.
"""

import io

import numpy as np
from PIL import Image

from curvax.training.data.archives import DataError

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""

ASPECT = (3 / 4, 4 / 3)  # width / height of crops
KEPT = 224 / 256  # share of the shorter side in central crops

_ATTEMPTS = 10  # boxes drawn at once, as in `transforms.inception_crop`


def random_crop(
    content: bytes, side: int, area: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """A box of random area, shape and position, resized to `side` × `side`.

    Szegedy et al., arXiv:1409.4842, section 6; the host's version of `transforms.inception_crop`.

    Args:
        content: an encoded image.
        side: pixels per side of the result.
        area: range of the uniform share of the image.
        rng: draws the box.

    Raises:
        DataError: the content is not an image, or is damaged.
    """
    image = _decoded(content)
    return _resized(image, side, _random_box(rng, *image.size, area))


def central_crop(content: bytes, side: int) -> np.ndarray:
    """The crop for evaluation: the central square with 224/256 of the shorter side, resized.

    For `side` 224 this equals resizing the shorter side to 256 first, as in He et al.,
    arXiv:1512.03385. An image that already has the size, as in ImageNet-C, is taken whole. Errors
    as in `random_crop`.
    """
    image = _decoded(content)
    width, height = image.size
    if (width, height) == (side, side):
        return np.asarray(image)
    kept = KEPT * min(width, height)
    left, top = (width - kept) / 2, (height - kept) / 2
    return _resized(image, side, (left, top, left + kept, top + kept))


def check(content: bytes) -> None:
    """Decodes an image only to raise the errors of `random_crop`."""
    _decoded(content)


def _decoded(content: bytes) -> Image.Image:
    """The image in RGB; errors as in `random_crop`."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        cause = "Pillow does not know its format"
        if not isinstance(error, Image.UnidentifiedImageError):
            cause = str(error)
        raise DataError(f"it cannot be decoded: {cause}") from error


def _resized(image: Image.Image, side: int, box: Box) -> np.ndarray:
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box))


def _random_box(
    rng: np.random.Generator, width: int, height: int, area: tuple[float, float]
) -> Box:
    """The first of ten random boxes that fits into the image, or the whole image if none does."""
    pixels = rng.uniform(*area, _ATTEMPTS) * width * height
    ratio = rng.uniform(*ASPECT, _ATTEMPTS)
    extents = np.round(np.sqrt(np.stack([pixels * ratio, pixels / ratio], axis=-1)))
    fits = np.all((extents >= 1) & (extents <= [width, height]), axis=-1)
    across, down = extents[np.argmax(fits)] if fits.any() else (width, height)
    left, top = np.floor(rng.random(2) * [width - across + 1, height - down + 1])
    return float(left), float(top), float(left + across), float(top + down)
