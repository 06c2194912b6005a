"""Operations of augmentation policies: an image [H, W, C] in [0, 1] and a strength ↦ an image.

They equal Pillow's operations of the same name, without the rounding to bytes; operations defined
on bytes (posterize, solarize, equalize) first round the image. Written by hand because the policies
need them traced, with traced strengths. Three families: tables of grey values, blends with a
degenerate image, and maps of the plane.
"""

import jax
import jax.numpy as jnp

GREY = 128 / 255  # the reference codes' value for uncovered pixels


def _bytes(image: jax.Array) -> jax.Array:
    return jnp.round(255 * jnp.clip(image, 0, 1)).astype(jnp.int32)


def _from_bytes(levels: jax.Array, like: jax.Array) -> jax.Array:
    return levels.astype(like.dtype) / 255


def invert(image: jax.Array) -> jax.Array:
    return 1 - image


def posterize(image: jax.Array, bits: jax.Array | int) -> jax.Array:
    """Keeps the highest `bits`, 0 to 8, of every byte."""
    dropped = 8 - jnp.asarray(bits, jnp.int32)
    return _from_bytes(_bytes(image) >> dropped << dropped, image)


def solarize(image: jax.Array, threshold: jax.Array | float) -> jax.Array:
    """Inverts bytes from the threshold, 0 to 256, upwards."""
    return jnp.where(_bytes(image) < threshold, image, 1 - image)


def solarize_add(image: jax.Array, addition: jax.Array | float) -> jax.Array:
    """Adds `addition`, -255 to 255, to bytes below 128."""
    return jnp.where(_bytes(image) < 128, jnp.clip(image + addition / 255, 0, 1), image)


def autocontrast(image: jax.Array) -> jax.Array:
    """Stretches each channel to [0, 1]; constant channels are unchanged."""
    low, high = image.min((0, 1), keepdims=True), image.max((0, 1), keepdims=True)
    return jnp.where(high > low, (image - low) / jnp.where(high > low, high - low, 1), image)


def equalize(image: jax.Array) -> jax.Array:
    """Equalises the histogram of each channel, with Pillow's integer arithmetic."""

    def channel(levels: jax.Array) -> jax.Array:
        counts = jnp.bincount(levels.ravel(), length=256).astype(jnp.int32)
        step = (levels.size - counts[levels.max()]) // 255
        below = jnp.cumsum(counts) - counts
        table = jnp.minimum((below + step // 2) // jnp.maximum(step, 1), 255)
        return jnp.where(step == 0, levels, table[levels])

    levels = jax.vmap(channel, in_axes=-1, out_axes=-1)(_bytes(image))
    return _from_bytes(levels, image)


def blend(degenerate: jax.Array, image: jax.Array, factor: jax.Array | float) -> jax.Array:
    """degenerate + factor · (image - degenerate), clipped to [0, 1]."""
    return jnp.clip(degenerate + factor * (image - degenerate), 0, 1)


def _luma(image: jax.Array) -> jax.Array:
    """Brightness [H, W, 1] by ITU-R 601; the mean of channels that are not three."""
    if image.shape[-1] != 3:
        return image.mean(-1, keepdims=True)
    return jnp.sum(image * jnp.array([[[0.299, 0.587, 0.114]]], image.dtype), -1, keepdims=True)


def color(image: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Changes the saturation; factor 0 is grey, 1 the image."""
    return blend(_luma(image), image, factor)


def contrast(image: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Changes the contrast; factor 0 is the mean brightness everywhere, 1 the image."""
    return blend(_luma(image).mean(), image, factor)


def brightness(image: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Changes the brightness; factor 0 is black, 1 the image."""
    return blend(jnp.zeros_like(image), image, factor)


def sharpness(image: jax.Array, factor: jax.Array | float) -> jax.Array:
    """Changes the sharpness; factor 1 is the image.

    Factor 0 is its convolution with (1 1 1, 1 5 1, 1 1 1) / 13, except at the border.
    """
    height, width = image.shape[0] - 2, image.shape[1] - 2
    window = lambda i, j: image[i : i + height, j : j + width]
    total = sum(window(i, j) for i in range(3) for j in range(3))
    smooth = (total + 4 * window(1, 1)) / 13
    return blend(image.at[1:-1, 1:-1].set(smooth), image, factor)


def shear_x(image: jax.Array, slope: jax.Array | float, fill: float = GREY) -> jax.Array:
    """Moves row y, counted from the top, left by slope · y."""
    return _resample(image, (1, slope, 0), (0, 1, 0), fill)


def shear_y(image: jax.Array, slope: jax.Array | float, fill: float = GREY) -> jax.Array:
    """Moves column x, counted from the left, up by slope · x."""
    return _resample(image, (1, 0, 0), (slope, 1, 0), fill)


def translate_x(image: jax.Array, share: jax.Array | float, fill: float = GREY) -> jax.Array:
    """Moves left by this share of the width, in whole pixels."""
    return _resample(image, (1, 0, jnp.trunc(share * image.shape[1])), (0, 1, 0), fill)


def translate_y(image: jax.Array, share: jax.Array | float, fill: float = GREY) -> jax.Array:
    """Moves up by this share of the height, in whole pixels."""
    return _resample(image, (1, 0, 0), (0, 1, jnp.trunc(share * image.shape[0])), fill)


def rotate(image: jax.Array, degrees: jax.Array | float, fill: float = GREY) -> jax.Array:
    """Rotates counter-clockwise about the centre."""
    angle = jnp.deg2rad(jnp.asarray(degrees, jnp.float32))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x, y = image.shape[1] / 2, image.shape[0] / 2
    return _resample(
        image, (cos, -sin, x - cos * x + sin * y), (sin, cos, y - sin * x - cos * y), fill
    )


Row = tuple[jax.Array | float, jax.Array | float, jax.Array | float]


def _resample(image: jax.Array, to_x: Row, to_y: Row, fill: float) -> jax.Array:
    """Takes the pixel at (x, y) from the nearest to (to_x · (x, y, 1), to_y · (x, y, 1)).

    Coordinates refer to pixel centres, half a pixel from the edge; outside the value is `fill`.
    """
    height, width, _ = image.shape
    x = (jnp.arange(width, dtype=jnp.float32) + 0.5)[None, :]
    y = (jnp.arange(height, dtype=jnp.float32) + 0.5)[:, None]
    place = lambda row: jnp.floor(row[0] * x + row[1] * y + row[2]).astype(jnp.int32)
    column, line = place(to_x), place(to_y)
    nearest = jnp.clip(line, 0, height - 1), jnp.clip(column, 0, width - 1)
    inside = (nearest[0] == line) & (nearest[1] == column)
    return jnp.where(inside[..., None], image[nearest], jnp.asarray(fill, image.dtype))
