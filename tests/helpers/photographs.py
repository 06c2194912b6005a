"""Folders of real JPEGs: pieces of the photographs that scikit-learn and matplotlib ship."""

import io
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

CLASSES = ("bloom", "hopper", "temple")


def photographs() -> dict[str, Image.Image]:
    """A flower, Rear Admiral Grace Hopper, and a Chinese temple."""
    hopper = resources.files("matplotlib") / "mpl-data/sample_data/grace_hopper.jpg"
    with resources.as_file(hopper) as file:
        portrait = Image.open(file).convert("RGB")
    flower, china = (Image.fromarray(load_sample_image(n)) for n in ("flower.jpg", "china.jpg"))
    return dict(zip(CLASSES, (flower, portrait, china)))


def jpeg(image: Image.Image, **options) -> bytes:
    content = io.BytesIO()
    image.save(content, "JPEG", quality=90, **options)
    return content.getvalue()


def pieces(image: Image.Image, count: int, seed: int) -> list[Image.Image]:
    """Random pieces of 60 to 150 pixels a side."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(60, 150, (count, 2))
    corners = rng.integers(0, np.array(image.size) - sizes)
    return [image.crop((*corner, *(corner + size))) for corner, size in zip(corners, sizes)]


def write_parts(root: Path, train: int, test: int) -> Path:
    """Class folders in root/train and root/val, so many pictures of each class."""
    write_class_folders(root / "train", train)
    write_class_folders(root / "val", test, seed=1)
    return root


def write_class_folders(root: Path, count: int, seed: int = 0, names=CLASSES) -> Path:
    """root/CLASS/CLASS_0.JPEG and so on, `count` of each class."""
    for name, image in photographs().items():
        if name in names:
            (root / name).mkdir(parents=True)
            for number, piece in enumerate(pieces(image, count, seed)):
                (root / name / f"{name}_{number}.JPEG").write_bytes(jpeg(piece))
    return root
