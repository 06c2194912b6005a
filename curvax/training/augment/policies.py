"""RandAugment and AutoAugment: random operations of `image_ops`, each at a level.

Level 10 is an operation's greatest strength in the papers; RandAugment's magnitude may exceed it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from curvax.training.augment import image_ops as ops
from curvax.training.augment.transforms import Transform, erase, per_image

Operation = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(key, image [H, W, C], level []) ↦ image."""


def _plain(op: Callable[[jax.Array], jax.Array]) -> Operation:
    return lambda key, image, level: op(image)


def _signed(op: Callable[..., jax.Array], greatest: float) -> Operation:
    """With a random sign."""

    def operation(key: jax.Array, image: jax.Array, level: jax.Array) -> jax.Array:
        strength = greatest * level / 10
        return op(image, jnp.where(jax.random.bernoulli(key), strength, -strength))

    return operation


def _whole(op: Callable[..., jax.Array], greatest: int, *, falling: bool = False) -> Operation:
    """With the integer strength ⌊greatest · level / 10⌋, or `greatest` minus that."""

    def operation(key: jax.Array, image: jax.Array, level: jax.Array) -> jax.Array:
        strength = jnp.floor(greatest * level / 10).astype(jnp.int32)
        return op(image, greatest - strength if falling else strength)

    return operation


def _enhanced(op: Callable[..., jax.Array]) -> Operation:
    """With a factor from 0.1 to 1.9; 1 is the image itself."""
    return lambda key, image, level: op(image, 1.8 * level / 10 + 0.1)


def _cutout(key: jax.Array, image: jax.Array, level: jax.Array) -> jax.Array:
    half = jnp.floor(40 / 224 * image.shape[0] * level / 10).astype(jnp.int32)
    return erase(key, image, 2 * half, ops.GREY)


_RAND: dict[str, Operation] = {
    "AutoContrast": _plain(ops.autocontrast),
    "Equalize": _plain(ops.equalize),
    "Invert": _plain(ops.invert),
    "Rotate": _signed(ops.rotate, 30),  # degrees
    "Posterize": _whole(ops.posterize, 4),  # bits
    "Solarize": _whole(ops.solarize, 256),  # threshold
    "Color": _enhanced(ops.color),
    "Contrast": _enhanced(ops.contrast),
    "Brightness": _enhanced(ops.brightness),
    "Sharpness": _enhanced(ops.sharpness),
    "ShearX": _signed(ops.shear_x, 0.3),
    "ShearY": _signed(ops.shear_y, 0.3),
    "TranslateX": _signed(ops.translate_x, 100 / 224),  # share of the side
    "TranslateY": _signed(ops.translate_y, 100 / 224),
    "Cutout": _cutout,
    "SolarizeAdd": _whole(ops.solarize_add, 110),
}


def rand_augment(layers: int = 2, magnitude: float = 15) -> Transform:
    """Applies `layers` operations, each uniform among 16, all at the same magnitude.

    Cubuk et al., arXiv:1909.13719, with the operations and strengths of the code that big_vision
    uses; its lengths in pixels of a 224 image are shares of the side here. (2, 15) are the values
    of Chen et al., arXiv:2106.01548. As in that code, posterize and solarize grow *weaker* with the
    magnitude: at 15 solarize has no effect.

    Args:
        layers: at least 1.
        magnitude: in [0, 20]; 10 is full strength.

    Raises:
        ValueError: `layers` or `magnitude` is out of range.
    """
    if layers < 1 or not 0 <= magnitude <= 20:
        raise ValueError(
            "`rand_augment` takes at least one layer and a magnitude in [0, 20], of which 10 is "
            f"full strength, and got {layers} and {magnitude}."
        )
    operations = tuple(_RAND.values())

    def change(key: jax.Array, image: jax.Array) -> jax.Array:
        level = jnp.float32(magnitude)
        for layer in range(layers):
            of_choice, of_operation = jax.random.split(jax.random.fold_in(key, layer))
            choice = jax.random.randint(of_choice, (), 0, len(operations))
            image = jax.lax.switch(choice, operations, of_operation, image, level)
        return image

    return per_image(change, branching=True)


Half = tuple[str, float, int]
"""Operation, probability, level."""

_CIFAR10: tuple[tuple[Half, Half], ...] = (
    (("Invert", 0.1, 7), ("Contrast", 0.2, 6)),
    (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
    (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)),
    (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.5, 8), ("Equalize", 0.9, 2)),
    (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
    (("Color", 0.4, 3), ("Brightness", 0.6, 7)),
    (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
    (("Equalize", 0.6, 5), ("Equalize", 0.5, 1)),
    (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
    (("Color", 0.7, 7), ("TranslateX", 0.5, 8)),
    (("Equalize", 0.3, 7), ("AutoContrast", 0.4, 8)),
    (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)),
    (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
    (("Solarize", 0.5, 2), ("Invert", 0.0, 3)),
    (("Equalize", 0.2, 0), ("AutoContrast", 0.6, 0)),
    (("Equalize", 0.2, 8), ("Equalize", 0.6, 4)),
    (("Color", 0.9, 9), ("Equalize", 0.6, 6)),
    (("AutoContrast", 0.8, 4), ("Solarize", 0.2, 8)),
    (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
    (("Solarize", 0.4, 5), ("AutoContrast", 0.9, 3)),
    (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.9, 2), ("Solarize", 0.8, 3)),
    (("Equalize", 0.8, 8), ("Invert", 0.1, 3)),
    (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, 1)),
)

_CIFAR10_OPERATIONS = _RAND | {
    "Posterize": _whole(ops.posterize, 4, falling=True),
    "Solarize": _whole(ops.solarize, 256, falling=True),
    "TranslateX": _signed(ops.translate_x, 10 / 32),
    "TranslateY": _signed(ops.translate_y, 10 / 32),
}

POLICIES = {"cifar10": (_CIFAR10, _CIFAR10_OPERATIONS)}


def auto_augment(policy: str = "cifar10") -> Transform:
    """One of the policy's pairs of operations, each applied with its own probability.

    Cubuk et al., arXiv:1805.09501: the 25 pairs of its table for CIFAR-10, with the strengths of
    the authors' CIFAR code, in which solarize and posterize grow with the level. This differs from
    that code in: uncovered pixels are grey rather than the mean of CIFAR; nothing is rounded to
    bytes between two operations; rotations are not rounded to degrees. (The code that came with
    SAM adds 70 more pairs of later searches.)

    Raises:
        ValueError: an unknown policy.
    """
    if policy not in POLICIES:
        raise ValueError(f"`auto_augment` knows the policies {[*POLICIES]}, and got {policy!r}.")
    pairs, by_name = POLICIES[policy]
    names = sorted({name for pair in pairs for name, _, _ in pair})
    operations = [by_name[name] for name in names]
    choices = np.array([[names.index(name) for name, _, _ in pair] for pair in pairs])
    chances = np.array([[chance for _, chance, _ in pair] for pair in pairs], np.float32)
    levels = np.array([[level for _, _, level in pair] for pair in pairs], np.float32)

    def change(key: jax.Array, image: jax.Array) -> jax.Array:
        of_pair, *of_halves = jax.random.split(key, 3)
        pair = jax.random.randint(of_pair, (), 0, len(pairs))
        for half, of_half in enumerate(of_halves):
            choice, chance, level = (
                jnp.asarray(column)[pair, half] for column in (choices, chances, levels)
            )
            of_chance, of_operation = jax.random.split(of_half)
            changed = jax.lax.switch(choice, operations, of_operation, image, level)
            image = jnp.where(jax.random.bernoulli(of_chance, chance), changed, image)
        return image

    return per_image(change, branching=True)
