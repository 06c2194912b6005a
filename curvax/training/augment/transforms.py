"""Augmentation in pure JAX: each `name(options)` returns a transform (key, batch) ↦ batch.

A batch is {"input": float [B, H, W, C], "label": float [B, classes]}; other entries are passed on.
Images are in [0, 1] before `normalise`, labels integers [B] before `one_hot`. Every example has its
own key and shapes are static, so that transforms can be jitted, vmapped and sharded.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import ArrayLike

from curvax.checks import check_range
from curvax.training.data import labelled_images

Batch = dict[str, jax.Array]
Transform = Callable[[jax.Array, Batch], Batch]


def compose(*transforms: Transform) -> Transform:
    """Applies the transforms in order, each with its own key."""

    def transform(key: jax.Array, batch: Batch) -> Batch:
        for number, each in enumerate(transforms):
            batch = each(jax.random.fold_in(key, number), batch)
        return batch

    return transform


def per_image(
    change: Callable[[jax.Array, jax.Array], jax.Array], *, branching: bool = False
) -> Transform:
    """Lifts (key, image [H, W, C]) ↦ image to a transform; each image has its own key.

    Args:
        change: the map of one image.
        branching: whether `change` selects one of several operations. On a CPU the images are then
            processed in a loop, and each computes only its own operation, about 20 times faster
            than all operations on all images, which vmap computes on other platforms.
    """

    together = jax.vmap(change)
    in_turn = lambda keys, images: jax.lax.map(lambda each: change(*each), (keys, images))

    def transform(key: jax.Array, batch: Batch) -> Batch:
        keys = jax.random.split(key, len(batch["input"]))
        apply = together
        if branching:
            apply = lambda *each: jax.lax.platform_dependent(*each, cpu=in_turn, default=together)
        return batch | {"input": apply(keys, batch["input"])}

    return transform


def normalise(mean: ArrayLike, std: ArrayLike) -> Transform:
    """(image - mean) / std per channel; `labelled_images.moments` computes both."""
    mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    return lambda key, batch: (
        batch | {"input": labelled_images.normalise(batch["input"], mean, std)}
    )


def one_hot(classes: int, smoothing: float = 0.0) -> Transform:
    """Integer labels [B] as rows [B, classes], smoothed: (1 - ε) y + ε / classes.

    Szegedy et al., arXiv:1512.00567, section 7.

    Args:
        classes: number of classes.
        smoothing: ε in [0, 1].
    """
    check_range("smoothing", smoothing, 0, 1, stage="one_hot")

    def transform(key: jax.Array, batch: Batch) -> Batch:
        label = jax.nn.one_hot(batch["label"], classes, dtype=jnp.float32)
        return batch | {"label": optax.smooth_labels(label, smoothing)}

    return transform


def flip() -> Transform:
    """Mirrors each image left to right with probability ½."""
    return per_image(lambda key, image: jnp.where(jax.random.bernoulli(key), image[:, ::-1], image))


def shift_crop(pad: int = 4, mode: str = "reflect") -> Transform:
    """Pads by `pad` pixels on each side and crops to the old size at a random position.

    Foret et al., arXiv:2010.01412, section 3.1; their code reflects, He et al., arXiv:1512.03385,
    fill with zeros.

    Args:
        pad: pixels.
        mode: of `jnp.pad`: "reflect", "constant" (zeros), "edge".
    """

    def change(key: jax.Array, image: jax.Array) -> jax.Array:
        if mode == "reflect" and pad >= min(image.shape[:2]):
            raise ValueError(
                f"`shift_crop` can reflect up to one pixel less than the image has, and got `pad` "
                f'{pad} for {image.shape[0]}×{image.shape[1]}. Pad less, or with mode="constant".'
            )
        padded = jnp.pad(image, [(pad, pad), (pad, pad), (0, 0)], mode=mode)
        top, left = jax.random.randint(key, (2,), 0, 2 * pad + 1)
        return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)

    return per_image(change)


def cutout(size: int, fill: float = 0.0) -> Transform:
    """Fills a square of `size`² pixels with its centre anywhere in the image.

    DeVries and Taylor, arXiv:1708.04552, who fill with the mean: place it after `normalise`.

    Raises:
        ValueError: `size` is below 1.
    """
    if size < 1:
        raise ValueError(f"`cutout` takes the side of its square in pixels, and got {size}.")
    return per_image(lambda key, image: erase(key, image, size, fill))


def erase(key: jax.Array, image: jax.Array, size: jax.Array | int, fill: float) -> jax.Array:
    """The image [H, W, C] with one square of `cutout`; `size` may be traced."""

    def inside(key: jax.Array, length: int) -> jax.Array:
        start = jax.random.randint(key, (), 0, length) - size // 2
        place = jnp.arange(length)
        return (start <= place) & (place < start + size)

    of_rows, of_columns = jax.random.split(key)
    rows, columns = inside(of_rows, image.shape[0]), inside(of_columns, image.shape[1])
    square = rows[:, None, None] & columns[None, :, None]
    return jnp.where(square, jnp.asarray(fill, image.dtype), image)


def mixup(probability: float = 0.5, alpha: float = 0.2) -> Transform:
    """Mixes each example, with this probability, with its neighbour in the batch; labels too.

        x̃ᵢ = λᵢ xᵢ + (1 - λᵢ) xᵢ₋₁,   λ ~ Beta(α, α) folded into [½, 1]

    Zhang et al., arXiv:1710.09412, eq. 1, with their α for ImageNet as the default. Chen et al.,
    arXiv:2106.01548, give "probability 0.5" and no α; in big_vision `p` is Beta's parameter and
    every batch is mixed, so that they may mean `mixup(1.0, 0.5)`. This differs from both codes in:
    λ is drawn per example, not per batch.

    Raises:
        ValueError: a probability outside [0, 1], an α that is not positive, labels not one-hot.
    """
    check_range("probability", probability, 0, 1, stage="mixup")
    if alpha <= 0:
        raise ValueError(f"`mixup` takes a positive `alpha` of Beta(α, α), and got {alpha}.")

    def transform(key: jax.Array, batch: Batch) -> Batch:
        image, label = batch["input"], batch["label"]
        if label.ndim != 2:
            raise ValueError(
                "`mixup` mixes labels of shape [B, classes], and got one of shape "
                f"{label.shape}. Place `one_hot(classes)` before it."
            )
        of_weight, of_choice = jax.random.split(key)
        weight = jax.random.beta(of_weight, alpha, alpha, (len(image),), jnp.float32)
        chosen = jax.random.bernoulli(of_choice, probability, (len(image),))
        weight = jnp.where(chosen, jnp.maximum(weight, 1 - weight), 1)
        return batch | {"input": _mixed(image, weight), "label": _mixed(label, weight)}

    return transform


def _mixed(x: jax.Array, weight: jax.Array) -> jax.Array:
    weight = weight.reshape((-1,) + (1,) * (x.ndim - 1))
    return weight * x + (1 - weight) * jnp.roll(x, 1, axis=0)


def resize(side: int) -> Transform:
    """Resizes to `side` × `side` pixels, bilinearly, with antialiasing when shrinking.

    Raises:
        ValueError: `side` is below 1.
    """
    if side < 1:
        raise ValueError(f"`resize` takes the side of its images in pixels, and got {side}.")

    def transform(key: jax.Array, batch: Batch) -> Batch:
        count, height, width, channels = batch["input"].shape
        if (height, width) == (side, side):
            return batch
        shape = (count, side, side, channels)
        return batch | {"input": jax.image.resize(batch["input"], shape, "linear")}

    return transform


_ATTEMPTS = 10  # boxes drawn at once, as in torchvision; all miss a square image once in 10⁸


def inception_crop(
    size: int, area: tuple[float, float] = (0.05, 1.0), aspect: tuple[float, float] = (0.75, 4 / 3)
) -> Transform:
    """Crops a box of random area, shape and position, and resizes it to `size` × `size`.

    Bilinear. Szegedy et al., arXiv:1409.4842, section 6. The first of ten random boxes that fits
    into the image is taken, or the whole image if none does.

    Args:
        size: pixels per side of the result.
        area: range of the uniform share of the image; the default is big_vision's, torchvision
            begins at 0.08.
        aspect: range of the uniform ratio width / height.
    """
    if not (0 < area[0] <= area[1] <= 1 and 0 < aspect[0] <= aspect[1]):
        raise ValueError(
            "`inception_crop` takes `area` and `aspect` as (least, greatest), both positive and "
            f"areas at most 1, and got {area} and {aspect}. Half of the image is the area 0.5."
        )

    def change(key: jax.Array, image: jax.Array) -> jax.Array:
        corner, extent = _box(key, image.shape[:2], area, aspect)
        scale = size / extent
        shape = (size, size, image.shape[-1])
        return jax.image.scale_and_translate(
            image, shape, (0, 1), scale, -corner * scale, "linear", antialias=False
        )

    return per_image(change)


def _box(
    key: jax.Array, sides: Sequence[int], area: tuple[float, float], aspect: tuple[float, float]
) -> tuple[jax.Array, jax.Array]:
    """Top left corner and extent, float32 [2] in pixels, of a random box inside the image."""
    of_area, of_aspect, of_place = jax.random.split(key, 3)
    height, width = sides
    pixels = jax.random.uniform(of_area, (_ATTEMPTS,), jnp.float32, *area) * height * width
    ratio = jax.random.uniform(of_aspect, (_ATTEMPTS,), jnp.float32, *aspect)
    extents = jnp.round(jnp.sqrt(jnp.stack([pixels / ratio, pixels * ratio], axis=-1)))
    whole = jnp.array(sides, jnp.float32)
    fits = jnp.all((extents >= 1) & (extents <= whole[None]), axis=-1)
    extent = jnp.where(fits.any(), extents[jnp.argmax(fits)], whole)
    room = whole - extent + 1
    corner = jnp.floor(jax.random.uniform(of_place, (2,), jnp.float32) * room)
    return jnp.minimum(corner, room - 1), extent
