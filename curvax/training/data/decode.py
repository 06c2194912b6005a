"""Encoded pictures ↦ squares of bytes, uint8 [side, side, 3], on the host.

Pillow decodes JPEG, PNG and the rest without holding Python's lock, so threads share the work. Its
bilinear filter averages over what an output pixel covers. Grey and CMYK pictures become RGB; a
camera's note of how it was held is passed over, as ImageNet's users do.
"""

import io

import numpy as np
from PIL import Image

from curvax.training.data.archives import DataError

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""

ASPECT = (3 / 4, 4 / 3)  # width / height of crops
KEPT = 224 / 256  # of the shorter side, in a test

_ATTEMPTS = 10  # boxes drawn at once, as `augment.inception_crop`


def random_crop(
    content: bytes, side: int, area: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """A box of random area, shape and place, resized.

    Szegedy et al., arXiv:1409.4842, section 6; as `augment.inception_crop` does it on the device,
    where `augment.flip` mirrors.

    Args:
        area: the least and greatest share of the picture, uniform between.

    Raises:
        DataError: the content is no picture, or is damaged.
    """
    image = _decoded(content)
    return _resized(image, side, _random_box(rng, *image.size, area))


def central_crop(content: bytes, side: int) -> np.ndarray:
    """What a test shows: the square in the middle whose side is 224/256 of the shorter one.

    So the shorter side becomes 256 where `side` is 224, as He et al., arXiv:1512.03385, test.
    A picture of the right size already, as ImageNet-C's, is taken whole; errors as in
    `random_crop`.
    """
    image = _decoded(content)
    width, height = image.size
    if (width, height) == (side, side):
        return np.asarray(image)
    kept = KEPT * min(width, height)
    left, top = (width - kept) / 2, (height - kept) / 2
    return _resized(image, side, (left, top, left + kept, top + kept))


def check(content: bytes) -> None:
    """Decodes a picture for the sake of the error that it may raise; as in `random_crop`."""
    _decoded(content)


def _decoded(content: bytes) -> Image.Image:
    """The picture in RGB; errors as in `random_crop`."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        cause = "no format of pictures that Pillow knows"
        if not isinstance(error, Image.UnidentifiedImageError):
            cause = str(error)
        raise DataError(f"it cannot be decoded: {cause}") from error


def _resized(image: Image.Image, side: int, box: Box) -> np.ndarray:
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box))


def _random_box(
    rng: np.random.Generator, width: int, height: int, area: tuple[float, float]
) -> Box:
    """The first of a few random boxes that lies inside, the whole if none does."""
    pixels = rng.uniform(*area, _ATTEMPTS) * width * height
    ratio = rng.uniform(*ASPECT, _ATTEMPTS)
    extents = np.round(np.sqrt(np.stack([pixels * ratio, pixels / ratio], axis=-1)))
    fits = np.all((extents >= 1) & (extents <= [width, height]), axis=-1)
    across, down = extents[np.argmax(fits)] if fits.any() else (width, height)
    left, top = np.floor(rng.random(2) * [width - across + 1, height - down + 1])
    return float(left), float(top), float(left + across), float(top + down)
