"""Corrupted images: noise, blur, lower contrast and pixelation at five strengths.

Hendrycks and Dietterich, arXiv:1903.12261. The strengths are those of their CIFAR-10-C, whose
images have 32 pixels per side; lengths in pixels are scaled to the side of larger images. This
differs from their code in: 1, images are not rounded to bytes; 2, images below 20 pixels per side,
on which strengths of pixelation would coincide, have strengths of their own.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy import ndimage

from curvax.training.data import datasets

STRENGTHS = (1, 2, 3, 4, 5)
_SIDE = 32  # pixels per side of the images that the strengths refer to

Corruption = Callable[[np.ndarray, float], np.ndarray]
"""(images [N, H, W, C] in [0, 1], parameter) ↦ corrupted images."""


def gaussian_noise(images: np.ndarray, deviation: float) -> np.ndarray:
    """Adds Gaussian noise to every channel of every pixel, the same at each call."""
    noise = datasets.stream(0, f"noise {deviation}").normal(0, deviation, images.shape)
    return np.clip(images + noise, 0, 1)


def gaussian_blur(images: np.ndarray, deviation: float) -> np.ndarray:
    """Convolves with a Gaussian; the deviation is in pixels of an image of 32, or of a smaller one,
    since blurring by less than 0.4 of a pixel has no effect."""
    scaled = deviation * max(images.shape[1] / _SIDE, 1)
    return ndimage.gaussian_filter(images, (0, scaled, scaled, 0), mode="nearest")


def contrast(images: np.ndarray, share: float) -> np.ndarray:
    """Scales the distance from each channel's mean by `share`."""
    mean = images.mean((1, 2), keepdims=True)
    return mean + share * (images - mean)


def pixelate(images: np.ndarray, share: float) -> np.ndarray:
    """Shrinks the sides to a share and enlarges them again, both with box filters."""
    height, width = images.shape[1:3]
    small, whole = (int(width * share), int(height * share)), (width, height)

    def channel(plane: np.ndarray) -> np.ndarray:
        image = Image.fromarray(plane)
        shrunk = image.resize(small, Image.Resampling.BOX)
        return np.asarray(shrunk.resize(whole, Image.Resampling.BOX))

    planes = np.moveaxis(images.astype(np.float32), -1, 1).reshape(-1, height, width)
    changed = np.stack([channel(plane) for plane in planes])
    return np.moveaxis(changed.reshape(len(images), -1, height, width), 1, -1)


CORRUPTIONS: dict[str, tuple[Corruption, tuple[float, ...]]] = {
    "gaussian_noise": (gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "gaussian_blur": (gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "contrast": (contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "pixelate": (pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
}
"""Name ↦ (corruption, its parameter at each strength)."""
_SMALL = 20  # pixels per side from which on all strengths of pixelation differ
_ON_SMALL = {"pixelate": (7 / 8, 6 / 8, 4 / 8, 3 / 8, 2 / 8)}


def corrupt(images: np.ndarray, name: str, strength: int) -> np.ndarray:
    """Images [N, H, W, C], bytes or numbers in [0, 1], at a strength from 1 to 5, as float32."""
    change, parameters = CORRUPTIONS[name]
    if images.shape[1] < _SMALL:
        parameters = _ON_SMALL.get(name, parameters)
    return change(datasets.numbers(images), parameters[strength - 1]).astype(np.float32)
