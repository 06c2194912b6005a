"""Images made worse: noise, blur, contrast and pixelation at five strengths.

Hendrycks and Dietterich, arXiv:1903.12261. The strengths are those of their CIFAR-10-C, whose
images have 32 pixels a side; what is measured in pixels is scaled to the side of larger images.
This differs from their code in: images stay numbers and are not rounded to bytes, and small images,
on which strengths of pixelation would coincide, have strengths of their own.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy import ndimage

from curvax.training.data import datasets

STRENGTHS = (1, 2, 3, 4, 5)
_SIDE = 32  # of the images that the strengths are for

Corruption = Callable[[np.ndarray, float], np.ndarray]
"""(images [N, H, W, C] in [0, 1], a parameter) ↦ the same, worse."""


def gaussian_noise(images: np.ndarray, deviation: float) -> np.ndarray:
    """Adds noise to every channel of every pixel, the same at each call."""
    noise = datasets.stream(0, f"noise {deviation}").normal(0, deviation, images.shape)
    return np.clip(images + noise, 0, 1)


def gaussian_blur(images: np.ndarray, deviation: float) -> np.ndarray:
    """Smooths over a Gaussian, whose deviation is in pixels of an image of 32, or of a smaller one:
    less than 0.4 of a pixel would do nothing."""
    scaled = deviation * max(images.shape[1] / _SIDE, 1)
    return ndimage.gaussian_filter(images, (0, scaled, scaled, 0), mode="nearest")


def contrast(images: np.ndarray, share: float) -> np.ndarray:
    """Leaves a share of the distance from each channel's mean."""
    mean = images.mean((1, 2), keepdims=True)
    return mean + share * (images - mean)


def pixelate(images: np.ndarray, share: float) -> np.ndarray:
    """Shrinks the sides to a share of theirs and enlarges them again, both by boxes."""
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
"""By name: what is done, and its parameter at each strength."""
_SMALL = 20  # pixels a side, from which on the strengths of pixelation are all different
_ON_SMALL = {"pixelate": (7 / 8, 6 / 8, 4 / 8, 3 / 8, 2 / 8)}


def corrupt(images: np.ndarray, name: str, strength: int) -> np.ndarray:
    """Images [N, H, W, C], bytes or numbers in [0, 1], at a strength from 1 to 5, as float32."""
    change, parameters = CORRUPTIONS[name]
    if images.shape[1] < _SMALL:
        parameters = _ON_SMALL.get(name, parameters)
    return change(datasets.numbers(images), parameters[strength - 1]).astype(np.float32)
